"""What a layer's inputs look like: their second moments, streamed from data through forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from tersetorch.methods.parametrization import live_weight
from tersetorch.methods.selection import DEFAULT_TARGETS, Target

# Most entries of the unfolded input of a convolution that are in memory at a time.
CHUNK = 1 << 22


@dataclass(frozen=True)
class Moments:
    """The second moments of a layer's inputs.

    Attributes:
        hessian: [groups, n, n], H = (2 / samples) sum x x^T: the second derivatives of the mean squared error of one
            output with respect to the n weights that make it. One for each group of a convolution.
        samples: vectors x that the sum is over; a convolution has one for each output position.
    """

    hessian: Tensor
    samples: int


def check_data(where: str, data: object, passes: int) -> None:
    """Refuses what is no iterable of batches, or can be gone through only once where more passes are needed."""
    if isinstance(data, Tensor | Mapping | str) or not isinstance(data, Iterable):
        raise TypeError(
            f"{where}: data must be an iterable of batches, got {type(data).__name__}; pass a list or a DataLoader"
        )
    if passes > 1 and iter(data) is data:
        raise TypeError(
            f"{where}: data must be iterable {passes} times, got {type(data).__name__}, which is used up after one; "
            "pass a list or a DataLoader"
        )


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch: a tensor, a tuple or list (inputs..., target), one input alone, or a dict.

    Of a tuple of more than one the last is taken for the target and left out; a dict gives keyword arguments.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module  # the wrapper would wait for the other ranks' batches
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*(batch[:-1] if len(batch) > 1 else batch))
    return model(batch)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts model into eval mode, and every module back into its own mode at the end; random numbers are drawn apart."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, training in modes:
            module.training = training


def layers_of(target: Target) -> list[nn.Module]:
    """The modules that hold the weight, each once."""
    return list(dict.fromkeys(module for module, _ in target.owners))


def parameter_of(target: Target) -> nn.Parameter:
    """What is trained as the weight: the parameter, also under our parametrization."""
    module, tensor = target.owners[0]
    live = live_weight(module, tensor)
    return module.get_parameter(tensor) if live is None else live.original


def check_layers(where: str, targets: Sequence[Target]) -> None:
    """Refuses weights of modules whose output is no product of the weight with their input."""
    for target in targets:
        layers = layers_of(target)
        problem = None
        for module, tensor in target.owners:
            if not isinstance(module, DEFAULT_TARGETS) or tensor != "weight":
                problem = f"be held by Linear and Conv layers alone, got {type(module).__name__}.{tensor}"
        if problem is None and len({getattr(module, "groups", 1) for module in layers}) > 1:
            problem = "be tied between convolutions of the same groups, got different ones"
        if problem is not None:
            raise ValueError(f"{where}: the weight of {target.name!r} must {problem}; pass ignore=[{target.name!r}]")


@torch.no_grad()
def in_order_of_use(model: nn.Module, targets: Sequence[Target], data: Iterable[Any]) -> list[int]:
    """The places in targets in the order in which a first batch reaches their layers; the unreached ones last."""
    reached: list[int] = []

    def note(place: int) -> Callable[..., None]:
        return lambda *_: reached.append(place)

    hooks = [
        module.register_forward_pre_hook(note(place))
        for place, target in enumerate(targets)
        for module in layers_of(target)
    ]
    try:
        with evaluating(model):
            for batch in data:
                call(model, batch)
                break
    finally:
        for hook in hooks:
            hook.remove()
    return list(dict.fromkeys([*reached, *range(len(targets))]))


@torch.no_grad()
def input_moments(
    where: str,
    model: nn.Module,
    target: Target,
    data: Iterable[Any],
    *,
    by_position: bool = False,
    bias: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Moments:
    """Runs model over data in eval mode and sums up the inputs that reach the target's layers.

    A convolution's input vectors are its patches, with its stride, padding (of any mode), dilation and groups. Tied
    layers' inputs are summed, and those of all ranks of a DistributedDataParallel, so that every rank must call.
    Memory holds the sum and one batch.

    Args:
        where: the caller, for messages.
        model: what to run.
        target: a weight that check_layers lets pass.
        data: batches as call takes them.
        by_position: the n entries of a patch are ordered [kernel position, channel], not [channel, kernel position].
        bias: a 1 is appended to each vector, so that n is one more.
        dtype: of the sum, float64 or float32.

    Raises:
        ValueError: there is no batch, none of them reaches the layer, or the inputs do not fit it or hold NaN or
            infinity.
    """
    layers = layers_of(target)
    weight = target.weight
    groups = getattr(layers[0], "groups", 1)
    n = weight[0].numel() + bias
    total = torch.zeros(groups, n, n, dtype=dtype, device=weight.device)
    samples = 0

    def add(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        nonlocal samples
        given = _given(where, target, module, arguments, keywords)
        for x in layer_inputs(module, given.to(dtype), by_position):
            _check_width(where, target, x, n - bias)
            if bias:
                x = functional.pad(x, (0, 1), value=1.0)
            total.baddbmm_(x.mT, x)
            samples += x.shape[1]

    hooks = [module.register_forward_pre_hook(add, with_kwargs=True) for module in layers]
    batches = _run(model, data, hooks)
    total, samples = _over_ranks(where, model, target, total, samples, batches)
    return Moments(total * (2 / samples), samples)


def _given(
    where: str, target: Target, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> Tensor:
    """What a layer is called with; refused where it is nothing to multiply, which its own hook sees before it does."""
    given = arguments[0] if arguments else keywords["input"]
    dims = len(getattr(module, "kernel_size", ()))
    if not isinstance(given, Tensor) or given.dim() not in ((dims + 1, dims + 2) if dims else range(1, 65)):
        wanted = f"tensors of {dims + 1} or {dims + 2} dimensions" if dims else "tensors"
        came = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(
            f"{where}: data must give the layer {target.name!r} {wanted}, got {came}; pass inputs of the model"
        )
    return given.detach()


def _check_width(where: str, target: Target, x: Tensor, width: int) -> None:
    """Refuses vectors that do not fit the weight, which a layer's own hook sees before the layer does."""
    if x.shape[-1] != width:
        raise ValueError(
            f"{where}: data must give the layer {target.name!r} inputs of {width} weights each, got {x.shape[-1]}; "
            "pass samples of the model's own shape"
        )


def _run(model: nn.Module, data: Iterable[Any], hooks: Sequence[RemovableHandle]) -> int:
    """Runs model on data in evaluation mode and takes the hooks off, whatever happens; the batches there were."""
    batches = 0
    try:
        with evaluating(model):
            for batch in data:
                call(model, batch)
                batches += 1
    finally:
        for hook in hooks:
            hook.remove()
    return batches


def _over_ranks(
    where: str, model: nn.Module, target: Target, total: Tensor, samples: int, batches: int
) -> tuple[Tensor, int]:
    """The sum and its samples over all ranks of a DistributedDataParallel, checked."""
    if isinstance(model, DistributedDataParallel):
        counts = torch.tensor([samples, batches], device=total.device)
        distributed.all_reduce(counts, group=model.process_group)
        distributed.all_reduce(total, group=model.process_group)
        samples, batches = counts.tolist()
    if not batches:
        raise ValueError(f"{where}: data must hold at least one batch, got none; pass some inputs of the model")
    if not samples:
        raise ValueError(
            f"{where}: data must reach the layer {target.name!r}, got no input there; pass samples that do, "
            f"or ignore=[{target.name!r}] where its parent reads the weight, as nn.MultiheadAttention does out_proj's"
        )
    if not bool(total.isfinite().all()):
        raise ValueError(
            f"{where}: data must give finite inputs, got NaN or infinity at the layer {target.name!r}; clean the data"
        )
    return total, samples


@torch.no_grad()
def input_squares(where: str, model: nn.Module, targets: Sequence[Target], data: Iterable[Any]) -> list[Tensor]:
    """The mean square of what each weight of targets is multiplied with, from one pass of data in eval mode.

    Returns:
        For each target float64 of a shape that expands to its weight's: [1, in, *kernel], for a convolution of several
        groups [out, in, *kernel]. Tied layers' inputs count together, and those of all ranks, as in input_moments.

    Raises:
        ValueError: as input_moments.
    """
    totals = [torch.zeros(0)] * len(targets)
    samples = [0] * len(targets)

    def summing(place: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def add(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            given = _given(where, targets[place], module, arguments, keywords)
            for x in layer_inputs(module, given.double(), by_position=False):
                _check_width(where, targets[place], x, totals[place].shape[1])
                totals[place] += x.square().sum(1)
                samples[place] += x.shape[1]

        return add

    hooks = []
    for place, target in enumerate(targets):
        layers = layers_of(target)
        weight = target.weight
        shape = getattr(layers[0], "groups", 1), weight.shape[1:].numel()
        totals[place] = torch.zeros(shape, dtype=torch.float64, device=weight.device)
        hooks += [module.register_forward_pre_hook(summing(place), with_kwargs=True) for module in layers]
    batches = _run(model, data, hooks)
    found = []
    for target, total, count in zip(targets, totals, samples, strict=True):
        total, count = _over_ranks(where, model, target, total, count, batches)
        weight = target.weight
        of_rows = total.repeat_interleave(weight.shape[0] // len(total), 0) if len(total) > 1 else total
        found.append((of_rows / count).view(-1, *weight.shape[1:]))
    return found


def layer_inputs(module: nn.Module, x: Tensor, by_position: bool) -> Iterator[Tensor]:
    """The vectors that a Linear or Conv layer multiplies with its weights, [groups, samples, n], some at a time."""
    if not x.numel():
        return  # a batch of no samples adds nothing
    if isinstance(module, nn.Linear):
        for some in x.reshape(-1, x.shape[-1]).split(max(1, CHUNK // max(1, x.shape[-1]))):
            yield some[None]
        return
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    kernel = module.kernel_size
    if x.dim() == len(kernel) + 1:
        x = x[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    windows = functional.pad(x, module._reversed_padding_repeated_twice, mode)
    for place, (size, stride, dilation) in enumerate(zip(kernel, module.stride, module.dilation, strict=True)):
        windows = windows.unfold(2 + place, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # [N, groups, channels, *positions, *kernel] -> [groups, N, *positions, then what makes a patch].
    windows = windows.unflatten(1, (module.groups, -1))
    positions = range(3, 3 + len(kernel))
    inside = range(3 + len(kernel), windows.dim())
    windows = windows.permute(1, 0, *positions, *((*inside, 2) if by_position else (2, *inside)))
    n = windows.shape[2 + len(kernel) :].numel()
    chunk = max(1, CHUNK // max(1, windows[:, 0].numel()))
    for some in windows.split(chunk, dim=1):
        yield some.reshape(module.groups, -1, n)
