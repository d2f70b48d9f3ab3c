"""How read_quantized refuses."""

from typing import NoReturn

WHERE = "read_quantized"


def refuse(rule: str, came: object, fix: str = "quantise or export it again") -> NoReturn:
    """Raises ValueError: source must RULE, got CAME; FIX."""
    raise ValueError(f"{WHERE}: source must {rule}, got {came}; {fix}")
