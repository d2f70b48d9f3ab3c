"""The diagonal of a loss's second derivatives by the weights, by Optimal Brain Damage's backward recursion."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from rich.progress import Progress
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tersetorch.methods.arguments import check_choice
from tersetorch.methods.parametrization import CompressedWeight, live_weight
from tersetorch.methods.prune.backward_recursion import Tape
from tersetorch.methods.prune.output_losses import Loss, at_output, check_loss
from tersetorch.methods.selection import Patterns, Target, select

Form = Literal["levenberg_marquardt", "exact"]
Batch: TypeAlias = Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Curvature:
    """What a pass over the data found.

    Attributes:
        loss: E, the mean over the data.
        second: d2E/dw^2 by the weights' names, of their shapes; float64 for a float64 weight, else float32.
    """

    loss: float
    second: dict[str, Tensor]


def diagonal_hessian(
    model: nn.Module,
    data: Iterable[Batch],
    loss: Loss,
    *,
    form: Form = "levenberg_marquardt",
    targets: Patterns | None = None,
    ignore: Patterns | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """h_kk = d2E/dw_k^2 for every weight, averaged over the patterns of data, by one backward recursion a batch.

    With a unit's input a_i = sum_j w_ij x_j and output x_i = f(a_i), from the loss down to the first layer:

        d2E/dw_ij^2 = (d2E/da_i^2) x_j^2        summed over all connections that share a weight (convolutions, ties)
        d2E/da_i^2  = f'(a_i)^2 sum_l w_li^2 (d2E/da_l^2) + f''(a_i) dE/dx_i

    The Levenberg-Marquardt form leaves the f'' term out, so that nothing is negative under a loss that is convex in
    each output; the two forms agree where f is piecewise linear, such as ReLU. It costs a few gradients in time, and
    in memory two to three times what a training step on the same batch does: smaller batches need less.

    Where it differs from the diagonal of the true Hessian: second derivatives between units of a layer are left out,
    and so are those between connections that share a weight, and those between two paths from one unit to the loss: a
    skip connection and the branch beside it, or h * sigmoid(h) and tanh(h) + h written out (functional.silu is one
    function, and whole). "exact" is therefore exact, where each unit reaches the loss by one path, for the weights of a
    layer with only element-wise operations between it and a loss that is a sum over its outputs, for the last layer
    under cross-entropy where its weight is used once for each output of a pattern, and for every layer of a network
    whose layers above have one unit; elsewhere it is the paper's approximation.

    E averages over the data set, whatever the batches: under a loss with reduction "mean" as if all were one batch;
    with "sum" each pattern's loss is its sum, and E the mean over patterns.

    Followed: Linear, convolutions, products of tensors, element-wise functions, pooling, batch normalisation in
    evaluation, layer and group normalisation, softmax, attention, embeddings, additions, concatenation, and what
    moves, picks, pads, sums or averages. A Python forward may branch and loop as it likes; anything else between a
    selected weight and the loss is refused by name.

    Args:
        model: any nn.Module that gives one tensor; it is run in eval mode and left as it was: mode, gradients, frozen
            parameters. float16 and bfloat16 are computed in float32. Pruned weights count as the zeros they are. A
            DistributedDataParallel averages over the data of all its ranks, so every rank must call.
        data: batches, read once: (inputs..., target), which calls model(*inputs), or a mapping with the key "target",
            whose other items are the model's keyword arguments. Dimension 0 is the pattern.
        loss: "mse" (the mean over outputs), "sse" (their sum, the paper's), "cross_entropy" (classes in dimension 1 or
            last), "nll" (over log_softmax), "bce_with_logits"; the loss module of torch.nn for these, with its
            reduction, weights, smoothing and ignored index; or a callable of output and target that gives the mean
            over the batch's patterns, which is differentiated by autograd, one pass for each output of a pattern.
        form: "levenberg_marquardt" or "exact".
        targets: as in prune.magnitude.
        ignore: as in prune.magnitude.
        progress: a bar for the batches is added to it.

    Returns:
        For each weight's name a tensor of its shape; float64 for a float64 weight, else float32.

    Raises:
        TypeError, ValueError: as prune.magnitude; data is empty, a batch or a target does not fit, or the result is
            not finite; an operation has no rule, or a selected weight takes no part in the loss.

    Source:
        LeCun, Denker, Solla, Optimal Brain Damage (1990), section 2, for both forms. Where we differ: see
        tersetorch.methods.prune.backward_recursion.
    """
    where = "prune.diagonal_hessian"
    check_pass(where, data, loss, form)
    chosen = select(where, model, targets, ignore, frozen=True)
    return curvature(where, model, data, loss, form, chosen, progress).second


def check_pass(where: str, data: object, loss: object, form: object) -> None:
    """Refuses what no pass can be made with."""
    check_loss(where, loss)
    check_choice(where, "form", form, get_args(Form))
    if not isinstance(data, Iterable) or isinstance(data, Tensor | str | Mapping):
        raise TypeError(
            f"{where}: data must be an iterable of batches, got {type(data).__name__}; pass a DataLoader or a list of "
            "(inputs, target)"
        )


def curvature(
    where: str,
    model: nn.Module,
    data: Iterable[Batch],
    loss: Loss,
    form: Form,
    chosen: Sequence[Target],
    progress: Progress | None,
) -> Curvature:
    """As diagonal_hessian, of chosen weights, with the loss that the same pass gives."""
    keys = {_key(target): target.name for target in chosen}
    shapes = {target.name: target.weight for target in chosen}
    sums = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in shapes.items()}
    unused = set(sums)
    # Neither what gathers gradients nor what compiles has anything to do here.
    inner = model.module if isinstance(model, nn.DataParallel | DistributedDataParallel) else model
    inner = getattr(inner, "_orig_mod", inner)
    total = weight = 0.0
    task = None
    if progress is not None:
        batches = len(data) if isinstance(data, Sized) else None
        task = progress.add_task("second derivatives", total=batches)
    with _undisturbed(model, keys):
        for batch in data:
            args, kwargs, target = _taken_apart(where, batch)
            tape = Tape(where, model, keys, form == "exact")
            with tape.recording():
                output = inner(*args, **kwargs)
            _check_output(where, output)
            if not len(output):
                continue
            wide = output.detach().to(torch.promote_types(output.dtype, torch.float32))
            found = at_output(where, loss, wide, target)
            # Where a loss has no curvature of its own, log_softmax needs the gradient in either form.
            gradient = found.gradient if form == "exact" or not bool(found.second.any()) else None
            for name, second in tape.backward(output, (gradient, found.second)).items():
                sums[name] += second
                unused.discard(name)
            total += found.total
            weight += found.weight
            if progress is not None and task is not None:
                progress.advance(task)
    total, weight, unused = _over_ranks(model, sums, total, weight, unused)
    if not weight:
        raise ValueError(f"{where}: data must hold at least one pattern, got none; pass batches of (inputs, target)")
    if unused:
        names = ", ".join(repr(name) for name in sums if name in unused)
        raise ValueError(
            f"{where}: every selected weight must take part in the loss, got {names}, which the output does not depend "
            f"on; pass ignore=[{names}]"
        )
    for name, each in sums.items():
        each /= weight
        if not bool(each.isfinite().all()):
            raise ValueError(
                f"{where}: the second derivatives must be finite, got NaN or infinity for {name!r}; look for them in "
                "the data and the model's outputs"
            )
    return Curvature(
        total / weight,
        {name: each.to(torch.promote_types(shapes[name].dtype, torch.float32)) for name, each in sums.items()},
    )


def _key(target: Target) -> Tensor | CompressedWeight:
    module, tensor = target.owners[0]
    live = live_weight(module, tensor)
    return getattr(module, tensor) if live is None else live.compressed


def _over_ranks(
    model: nn.Module, sums: Mapping[str, Tensor], total: float, weight: float, unused: set[str]
) -> tuple[float, float, set[str]]:
    """Adds up what all ranks of a DistributedDataParallel found, sums in place; for another model nothing changes."""
    if not isinstance(model, DistributedDataParallel):
        return total, weight, unused
    for each in sums.values():
        distributed.all_reduce(each, group=model.process_group)
    numbers = next(iter(sums.values())).new_tensor([total, weight, *(name not in unused for name in sums)])
    distributed.all_reduce(numbers, group=model.process_group)
    total, weight, *used = numbers.tolist()
    return total, weight, {name for name, count in zip(sums, used, strict=True) if not count}


@contextmanager
def _undisturbed(model: nn.Module, keys: Mapping[Tensor | CompressedWeight, str]) -> Iterator[None]:
    """Evaluation mode, gradients on for the weights of interest only, no autocast; then as before.

    What the data draws comes from a fork of torch's generator.
    """
    modes = [(module, module.training) for module in model.modules()]
    frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    kinds = {parameter.device.type for parameter, _ in frozen}
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(torch.enable_grad())
            for kind in kinds:
                stack.enter_context(torch.autocast(kind, enabled=False))
            if "torch._dynamo" in sys.modules:  # a compiled model would show none of its calls
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            model.eval()
            for parameter, _ in frozen:
                parameter.requires_grad_(parameter in keys)
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, trains in frozen:
            parameter.requires_grad_(trains)


def _taken_apart(where: str, batch: object) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    if isinstance(batch, Mapping):
        args: tuple[Any, ...] = ()
        kwargs = {key: value for key, value in batch.items() if key != "target"}
        target = batch.get("target")
    elif isinstance(batch, list | tuple) and len(batch) > 1:
        args, kwargs, target = tuple(batch[:-1]), {}, batch[-1]
    else:
        target = None
    if not isinstance(target, Tensor):
        raise TypeError(
            f"{where}: a batch must be (inputs..., target) or a mapping with the key 'target', the target a tensor, "
            f"got {type(batch).__name__}; pass pairs such as a DataLoader gives"
        )
    return args, kwargs, target


def _check_output(where: str, output: object) -> None:
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() == 0:
        got = f"one of {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(
            f"{where}: model must give one tensor of numbers, patterns first, got {got}; wrap it in a module that does"
        )
