"""Does a person type it? The tersetorch command."""
