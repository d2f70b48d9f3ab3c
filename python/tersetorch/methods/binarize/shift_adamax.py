"""AdaMax by shifts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tersetorch.methods.arguments import check_number
from tersetorch.methods.binarize.signs import ap2


class ShiftAdaMax(Optimizer):
    """m = b1 m + (1 - b1) g, v = max(b2 v, |g|), theta -= ap2(lr / (1 - b1^t)) * m / ap2(v).

    Every product but m's own averaging is one with a power of two: a shift. As in the authors' code v itself becomes
    ap2(v) at every step; eps keeps it from 0.

    Args:
        params: parameters or groups of them.
        lr: the largest change of a step, about; halve it to shift it.
        betas: b1 and b2 in [0, 1).
        eps: the least v.

    Raises:
        TypeError, ValueError: a number is none, or outside its range, or betas are not two.

    Source:
        Hubara et al., Binarized Neural Networks (2016), algorithm 4: lr 2^-10, 1 - b1 = 2^-3, 1 - b2 = 2^-10; eps 2^-27
        is the code's.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2**-10,
        betas: tuple[float, float] = (1 - 2**-3, 1 - 2**-10),
        eps: float = 2**-27,
    ) -> None:
        check_number("ShiftAdaMax", "lr", lr, 0.0, float("inf"))
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ValueError(f"ShiftAdaMax: betas must be two numbers, got {betas!r}; pass (b1, b2)")
        for name, beta in zip(("betas[0]", "betas[1]"), betas, strict=True):
            check_number("ShiftAdaMax", name, beta, 0.0, 1.0)
        check_number("ShiftAdaMax", "eps", eps, 0.0, float("inf"))
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Takes a step; a closure is called first, with gradients on."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["mean"] = torch.zeros_like(parameter)
            state["largest"] = torch.zeros_like(parameter)
        first, second = group["betas"]
        state["step"] += 1
        state["mean"].lerp_(gradient, 1 - first)
        largest = torch.maximum(second * state["largest"], gradient.abs()).clamp(min=group["eps"])
        state["largest"].copy_(ap2(largest))
        rate = ap2(torch.tensor(group["lr"] / (1 - first ** float(state["step"]))))
        parameter.addcdiv_(state["mean"], state["largest"], value=-float(rate))
