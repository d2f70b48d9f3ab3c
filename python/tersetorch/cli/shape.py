"""Shapes as a person types them."""

import math

import typer

# Numbers of one input: 4 GiB of float32.
MOST = 2**30


def parse_shape(text: str) -> list[int]:
    """The sizes of a shape such as 1x784.

    Raises:
        typer.BadParameter: a size is not a positive whole number, or there are too many numbers.
    """
    sizes = text.lower().split("x")
    if not all(size.isascii() and size.isdecimal() and int(size) > 0 for size in sizes):
        raise typer.BadParameter(f"a shape must be positive sizes joined by x, such as 1x784, got {text!r}")
    shape = [int(size) for size in sizes]
    if math.prod(shape) > MOST:
        raise typer.BadParameter(f"a shape must hold at most {MOST} numbers, got {text!r}")
    return shape
