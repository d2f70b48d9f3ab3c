"""Checks that the room's functions share."""

from math import prod

from torch import Tensor


def check_count(where: str, name: str, value: int, least: int = 1) -> None:
    """Refuses what is no int of at least least."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{where}: {name} must be an int, got {value!r}; pass a whole number")
    if value < least:
        raise ValueError(f"{where}: {name} must be at least {least}, got {value}; pass a larger number")


def check_seed(where: str, seed: int) -> None:
    """Refuses what torch.Generator.manual_seed does not take."""
    check_count(where, "seed", seed, least=0)
    if seed >= 2**63:
        raise ValueError(f"{where}: seed must be below 2**63, got {seed}; pass a smaller number")


def check_rate(where: str, name: str, rate: float) -> None:
    """Refuses what is no rate of dropout."""
    if not isinstance(rate, int | float) or isinstance(rate, bool):
        raise TypeError(f"{where}: {name} must be a number, got {rate!r}; pass a rate such as 0.3")
    if not 0 <= rate < 1:
        raise ValueError(f"{where}: {name} must be in [0, 1), got {rate}; pass a rate such as 0.3")


def check_values(where: str, images: Tensor, values: int) -> None:
    """Refuses images that do not flatten to so many values each."""
    if prod(images.shape[1:]) != values:
        raise ValueError(
            f"{where}: images must have {values} values each, got shape {tuple(images.shape)}; "
            "build the network with in_features= your image size"
        )


def check_images(where: str, images: Tensor, channels: int, size: int | None = None, least: int = 1) -> None:
    """Refuses what is no batch [N, channels, size, size], or of least pixels a side where any size will do."""
    if not isinstance(images, Tensor):
        raise TypeError(f"{where}: images must be a tensor, got {type(images).__name__}; pass a batch of images")
    wanted = f"[N, {channels}, {size}, {size}]" if size else f"[N, {channels}, height, width] of {least} pixels or more"
    fits = images.ndim == 4 and images.shape[1] == channels
    if not fits or not (images.shape[2:] == (size, size) if size else min(images.shape[2:]) >= least):
        raise ValueError(f"{where}: images must be {wanted}, got shape {tuple(images.shape)}; crop or scale them")
