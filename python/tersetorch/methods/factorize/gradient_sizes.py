"""How much each weight's error counts for the loss: the lengths of its gradients over the samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tersetorch.methods.factorize.sites import choose, module_of
from tersetorch.methods.prune.calibration import call, check_data, evaluating
from tersetorch.methods.prune.output_losses import MODULES, Loss, check_loss
from tersetorch.methods.selection import Patterns


def gradient_sizes(
    model: nn.Module,
    data: Iterable[Any],
    loss: Loss,
    *,
    targets: Patterns | None = None,
    ignore: Patterns | None = None,
) -> dict[str, Tensor]:
    """For each weight the root of the sum of its squared gradients over the samples; model stays as it is.

        alpha_p = sqrt(sum_n (dL_n / dW_p)^2)

    with L_n the loss of sample n alone: one backward pass each, in eval mode. What the methods of tt.factorize take as
    importance, so that they lower the Mahalanobis-like sum (alpha_p (W_p - W'_p))^2.

    Args:
        model: any nn.Module that gives one tensor.
        data: batches, read once: (inputs..., target), or a mapping with the key "target", whose other items are the
            model's keyword arguments. Dimension 0 is the sample; a thousand samples say enough.
        loss: as in prune.obd: a name such as "cross_entropy", a loss module, or a callable of output and target.
        targets: as in factorize.svd.
        ignore: as in factorize.svd.

    Returns:
        A tensor of the weight's shape for each layer's name, float32, or float64 for a float64 weight.

    Raises:
        TypeError, ValueError: an argument is of another type, a pattern matches nothing, data is empty, a selected
            weight takes no part in the loss, or a gradient is not finite.

    Source:
        Denton et al., Exploiting linear structure within convolutional networks (2014), section 3.1.
    """
    where = "factorize.gradient_sizes"
    check_loss(where, loss)
    check_data(where, data, 1)
    chosen = choose(where, model, targets, ignore)
    weights = [module_of(target).weight for target in chosen]
    measure = MODULES[loss] if isinstance(loss, str) else loss
    flags = [weight.requires_grad for weight in weights]
    totals = [torch.zeros_like(weight, dtype=torch.float64, requires_grad=False) for weight in weights]
    samples = 0
    try:
        with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
            for weight in weights:
                weight.requires_grad_(True)
            for inputs, wanted in _samples(where, data):
                value = measure(call(model, inputs), wanted)
                found = torch.autograd.grad(value, weights, allow_unused=True)
                for target, total, gradient in zip(chosen, totals, found, strict=True):
                    if gradient is None:
                        raise ValueError(
                            f"{where}: targets must take part in the loss, got {target.name!r}, which does not; pass "
                            f"ignore=[{target.name!r}]"
                        )
                    total += gradient.double().square()
                samples += 1
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)
    if not samples:
        raise ValueError(f"{where}: data must hold at least one sample, got none; pass some inputs with their targets")
    for target, total in zip(chosen, totals, strict=True):
        if not bool(total.isfinite().all()):
            raise ValueError(f"{where}: gradients must be finite, got others at {target.name!r}; clean the data")
    return {
        target.name: total.sqrt().to(torch.promote_types(target.weight.dtype, torch.float32))
        for target, total in zip(chosen, totals, strict=True)
    }


def _samples(where: str, data: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Each sample as a batch of one for calibration.call, and its target."""
    for batch in data:
        if isinstance(batch, Mapping) and isinstance(batch.get("target"), Tensor):
            rest = {name: value for name, value in batch.items() if name != "target"}
            for index in range(len(batch["target"])):
                yield (
                    {k: v[index : index + 1] if isinstance(v, Tensor) else v for k, v in rest.items()},
                    batch["target"][index : index + 1],
                )
        elif isinstance(batch, tuple | list) and len(batch) > 1 and all(isinstance(each, Tensor) for each in batch):
            for index in range(len(batch[-1])):
                one = [each[index : index + 1] for each in batch]
                yield one, one[-1]  # call leaves the last out
        else:
            raise TypeError(
                f"{where}: data must give (inputs..., target) or a dict with the key 'target', got "
                f"{type(batch).__name__}; pass a DataLoader or a list of them"
            )
