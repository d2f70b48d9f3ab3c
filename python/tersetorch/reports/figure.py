"""matplotlib, where it is installed."""

from __future__ import annotations

from typing import Any


def figure_class(where: str) -> Any:
    """Matplotlib's Figure, which draws without a display.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{where}: the picture must be drawn by matplotlib, got no such package; "
            "run pip install 'tersetorch[report]'"
        ) from error
    return Figure
