"""Readers of files that others write: exact, or refused with a sentence."""
