"""One file per suite; each has run(threads, quick), which returns a list of records."""
