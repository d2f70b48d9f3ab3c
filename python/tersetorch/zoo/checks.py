"""Checks that the room's functions share."""


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
