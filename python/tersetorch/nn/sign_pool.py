"""A max-pool of packed signs."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from tersetorch import ops


class SignMaxPool2d(nn.Module):
    """The largest sign of each window of packed images, then the other signs where flips has a 1.

    Shapes: int64 [N, H, W, words] -> [N, H', W', words], or both without N; positions outside an image never win.

    Args:
        kernel_size, stride, padding, dilation, ceil_mode: as torch.nn.MaxPool2d takes them.
        flips: int64 [words], bits of channels whose signs are turned round behind the pool, or None.

    Raises:
        TypeError: flips is no int64 tensor.
        ValueError: flips is not 1-D.
    """

    flips: Tensor | None

    def __init__(
        self,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        *,
        flips: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.kernel_size, self.padding, self.dilation, self.ceil_mode = kernel_size, padding, dilation, ceil_mode
        self.stride = kernel_size if stride is None else stride
        self.register_buffer("flips", flips)
        self.validate()

    def validate(self) -> None:
        """Checks flips.

        Raises:
            TypeError: it is no int64 tensor.
            ValueError: it is not 1-D.
        """
        flips: object = self.flips
        if flips is not None and (not isinstance(flips, Tensor) or flips.dtype != torch.int64):
            got = flips.dtype if isinstance(flips, Tensor) else type(flips).__name__
            raise TypeError(f"SignMaxPool2d: flips must be an int64 tensor, got {got}; pass what sign_pack returns")
        if isinstance(flips, Tensor) and flips.dim() != 1:
            raise ValueError(
                f"SignMaxPool2d: flips must be [words], got shape {tuple(flips.shape)}; pass a bit for each channel"
            )

    @classmethod
    def from_dense(cls, module: nn.MaxPool2d, flipped: Tensor | None = None) -> Self:
        """The pool of packed signs that module is of the numbers behind them; flipped is bool [channels]."""
        flips = ops.sign_pack(0.5 - flipped.float()) if flipped is not None and bool(flipped.any()) else None
        pool = cls(module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode, flips=flips)
        return pool.train(module.training)

    @classmethod
    def of_sizes(cls, words: int | None = None, **sizes: Any) -> Self:
        """A pool of these sizes, with so many words of flips, 0, for bits that come from elsewhere."""
        return cls(**sizes, flips=None if words is None else torch.zeros(words, dtype=torch.int64))

    @property
    def sizes(self) -> dict[str, Any]:
        """What of_sizes takes to make a pool of the same sizes."""
        usual = {"stride": self.kernel_size, "padding": 0, "dilation": 1, "ceil_mode": False}
        changed = {name: getattr(self, name) for name in usual if getattr(self, name) != usual[name]}
        words = {} if self.flips is None else {"words": self.flips.numel()}
        return {"kernel_size": self.kernel_size, **changed, **words}

    def forward(self, input: Tensor) -> Tensor:
        """Pools packed images."""
        return ops.sign_max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.flips
        )

    def extra_repr(self) -> str:
        """What print(module) shows between the parentheses."""
        shown = [f"{name}={value}" for name, value in self.sizes.items() if name != "words"]
        return ", ".join(shown + ["flips=True"] * (self.flips is not None))
