"""Shapes as a person types them."""

import typer


def parse_shape(text: str) -> list[int]:
    """The sizes of a shape such as 1x784.

    Raises:
        typer.BadParameter: a size is not a positive whole number.
    """
    sizes = text.lower().split("x")
    if not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise typer.BadParameter(f"a shape must be positive sizes joined by x, such as 1x784, got {text!r}")
    return [int(size) for size in sizes]
