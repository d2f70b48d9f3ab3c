"""One file per suite; each has groups(options), what it would measure, and measure(group, ...), which returns records."""
