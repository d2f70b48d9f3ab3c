"""Does a person type it? The tersetorch command."""

from tersetorch.cli.app import app, main

__all__ = ["app", "main"]
