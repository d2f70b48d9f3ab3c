"""One file per suite: groups(options) says what it would measure, and a class of its name measures one at a time."""
