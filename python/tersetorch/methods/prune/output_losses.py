"""What a loss says of a network's outputs: its gradient and the diagonal of its second derivatives there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

LossName = Literal["mse", "sse", "cross_entropy", "nll", "bce_with_logits"]
Loss: TypeAlias = LossName | Callable[[Tensor, Tensor], Tensor]

MODULES: dict[str, nn.Module] = {
    "mse": nn.MSELoss(),
    "sse": nn.MSELoss(reduction="sum"),
    "cross_entropy": nn.CrossEntropyLoss(),
    "nll": nn.NLLLoss(),
    "bce_with_logits": nn.BCEWithLogitsLoss(),
}
FUNCTIONS: dict[Callable[..., Tensor], str] = {
    functional.mse_loss: "mse",
    functional.cross_entropy: "cross_entropy",
    functional.nll_loss: "nll",
    functional.binary_cross_entropy_with_logits: "bce_with_logits",
}


@dataclass(frozen=True)
class AtOutput:
    """A loss over one batch, as a sum whose parts add up over batches.

    Attributes:
        total: the sum of the loss's terms.
        weight: what the sum over all batches is divided by, this batch's share of it.
        gradient: of total, of the output's shape.
        second: the diagonal of total's second derivatives, of the output's shape.
    """

    total: float
    weight: float
    gradient: Tensor
    second: Tensor


def check_loss(where: str, loss: object) -> None:
    """Refuses what names no loss and cannot be called."""
    if isinstance(loss, str):
        if loss not in get_args(LossName):
            names = ", ".join(get_args(LossName))
            raise ValueError(f"{where}: loss must be one of {names} or a callable, got {loss!r}; pass one of these")
    elif not callable(loss):
        raise TypeError(
            f"{where}: loss must be a name, a loss module or a callable, got {type(loss).__name__}; pass for example "
            "'cross_entropy'"
        )
    elif (reduction := getattr(loss, "reduction", "mean")) not in ("mean", "sum"):
        raise ValueError(
            f"{where}: loss must have reduction 'mean' or 'sum', got {reduction!r}; build it with one of these"
        )


def at_output(where: str, loss: Loss, output: Tensor, target: Tensor) -> AtOutput:
    """The loss and its derivatives at output [N, ...], a float32 or float64 tensor without gradients.

    Raises:
        ValueError: target does not fit output, or loss gives no scalar.
    """
    named = loss if isinstance(loss, str) else FUNCTIONS.get(loss) if not isinstance(loss, nn.Module) else None
    module = MODULES[named] if named is not None else loss
    try:
        if isinstance(module, nn.CrossEntropyLoss):
            return _cross_entropy(module, output, target)
        if isinstance(module, nn.NLLLoss):
            return _nll(module, output, target)
        if isinstance(module, nn.BCEWithLogitsLoss):
            return _bce_with_logits(module, output, target)
        if isinstance(module, nn.MSELoss):
            return _squares(module, output, target)
        return _any(where, cast(Callable[[Tensor, Tensor], Tensor], module), output, target)
    except (RuntimeError, IndexError) as error:
        shapes = f"{tuple(target.shape)} of {target.dtype} beside {tuple(output.shape)} of {output.dtype}"
        raise ValueError(
            f"{where}: the target must fit the model's output as loss wants it, got {shapes} ({error}); mend the data"
        ) from error


def _divisor(module: nn.Module, terms: float, patterns: int) -> float:
    return terms if module.reduction == "mean" else patterns


def _squares(module: nn.MSELoss, output: Tensor, target: Tensor) -> AtOutput:
    """Of sum (y - t)^2: 2 (y - t) and 2."""
    if target.shape != output.shape:
        raise RuntimeError("the shapes differ")
    difference = output - target
    return AtOutput(
        float(difference.double().square().sum()),
        _divisor(module, output.numel(), len(output)),
        2 * difference,
        torch.full_like(output, 2),
    )


def _bce_with_logits(module: nn.BCEWithLogitsLoss, output: Tensor, target: Tensor) -> AtOutput:
    """Of -sum w (p t log s + (1 - t) log(1 - s)), s = sigmoid(y): w ((1 - t) s - p t (1 - s)) and the second.

    That is w s (1 - s)(p t + 1 - t).
    """
    weight = 1 if module.weight is None else module.weight.to(output)
    if target.shape != output.shape:
        raise RuntimeError("the shapes differ")
    positive = 1 if module.pos_weight is None else module.pos_weight.to(output)
    target = target.to(output)
    total = functional.binary_cross_entropy_with_logits(
        output, target, module.weight, reduction="sum", pos_weight=module.pos_weight
    )
    s = output.sigmoid()
    return AtOutput(
        float(total),
        _divisor(module, output.numel(), len(output)),
        weight * ((1 - target) * s - positive * target * (1 - s)),
        weight * s * (1 - s) * (positive * target + 1 - target),
    )


def _cross_entropy(module: nn.CrossEntropyLoss, output: Tensor, target: Tensor) -> AtOutput:
    """Of -sum_c r_c log p_c with p = softmax(y) and R = sum_c r_c: R p - r and R p (1 - p)."""
    logits, back = _classes_second(output, target)
    log_p = logits.log_softmax(1)
    shape = [1, -1] + [1] * (logits.dim() - 2)
    weight = torch.ones_like(logits[:1]) if module.weight is None else module.weight.to(logits).view(shape)
    classes = logits.shape[1]
    smoothing = module.label_smoothing
    if target.is_floating_point():
        r = weight * (target.to(logits) * (1 - smoothing) + smoothing / classes)
        terms = float(target.numel() / classes)
    else:
        known = (target != module.ignore_index).unsqueeze(1)
        chosen = torch.zeros_like(logits).scatter_(1, target.unsqueeze(1).where(known, 0), 1.0)
        r = torch.where(known, weight * (chosen * (1 - smoothing) + smoothing / classes), 0)
        terms = float((weight * chosen).sum(1, keepdim=True)[known].sum())
    mass, p = r.sum(1, keepdim=True), log_p.exp()
    return AtOutput(
        float(-(r * log_p).where(r != 0, 0).double().sum()),
        _divisor(module, terms, len(output)),
        back(mass * p - r),
        back(mass * p * (1 - p)),
    )


def _nll(module: nn.NLLLoss, output: Tensor, target: Tensor) -> AtOutput:
    """Of -sum w_t y_t: -w_t at the target, and no second derivative; log_softmax below it brings the curvature in."""
    log_p, back = _classes_second(output, target)
    known = (target != module.ignore_index).unsqueeze(1)
    places = target.unsqueeze(1).where(known, 0)
    weight = torch.ones_like(log_p[:1, :, ...]) if module.weight is None else module.weight.to(log_p)
    if module.weight is not None:
        weight = weight.view([1, -1] + [1] * (log_p.dim() - 2))
    chosen = torch.zeros_like(log_p).scatter_(1, places, 1.0) * weight * known
    return AtOutput(
        float(-(chosen * log_p).where(chosen != 0, 0).double().sum()),
        _divisor(module, float(chosen.sum()), len(output)),
        back(-chosen),
        torch.zeros_like(output),
    )


def _classes_second(output: Tensor, target: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The output with its classes in dimension 1, where torch wants them, and how to bring a result back.

    They may also come last, as language models give them: [N, T, classes] with targets [N, T].
    """
    if target.is_floating_point():
        if target.shape != output.shape:
            raise RuntimeError("the shapes differ")
        return output, lambda result: result
    if target.shape == output.shape[:1] + output.shape[2:]:
        return output, lambda result: result
    if target.shape == output.shape[:-1]:
        return output.movedim(-1, 1), lambda result: result.movedim(1, -1)
    raise RuntimeError("a class number is wanted for each position")


def _any(where: str, loss: Callable[[Tensor, Tensor], Tensor], output: Tensor, target: Tensor) -> AtOutput:
    """By autograd, a pass for each output of a pattern: patterns do not meet in a loss, so they share the passes."""
    mean = getattr(loss, "reduction", "mean") == "mean"
    patterns = len(output)
    y = output.detach().requires_grad_()
    with torch.enable_grad():
        total = loss(y, target)
        if not isinstance(total, Tensor) or total.numel() != 1 or not total.requires_grad:
            got = f"{tuple(total.shape)}" if isinstance(total, Tensor) else type(total).__name__
            raise ValueError(
                f"{where}: loss must give one number that depends on the output, got {got}; return the batch's mean"
            )
        (gradient,) = torch.autograd.grad(total.sum(), y, create_graph=True)
        flat = gradient.reshape(patterns, -1)
        second = torch.zeros_like(flat)
        if gradient.requires_grad:
            for unit in range(flat.shape[1]):
                (row,) = torch.autograd.grad(flat[:, unit].sum(), y, retain_graph=True, allow_unused=True)
                if row is not None:
                    second[:, unit] = row.reshape(patterns, -1)[:, unit]
    scale = patterns if mean else 1
    return AtOutput(
        float(total.detach()) * scale, patterns, gradient.detach() * scale, second.detach().view(y.shape) * scale
    )
