"""What a layer's inputs look like: their second moments, streamed from data through forward hooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from tersetorch.methods.distributed import failing_together
from tersetorch.methods.parametrization import live_weight
from tersetorch.methods.prune.obs_ranks import Ranks
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


def check_data(where: str, data: object, passes: int, name: str = "data") -> None:
    """Refuses what is no iterable of batches, or can be gone through only once where more passes are needed."""
    if isinstance(data, Tensor | Mapping | str) or not isinstance(data, Iterable):
        raise TypeError(
            f"{where}: {name} must be an iterable of batches, got {type(data).__name__}; pass a list or a DataLoader"
        )
    if passes > 1 and iter(data) is data:
        raise TypeError(
            f"{where}: {name} must be iterable {passes} times, got {type(data).__name__}, which is used up after one; "
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


def in_order_of_use(model: nn.Module, targets: Sequence[Target], data: Iterable[Any]) -> list[int]:
    """The places in targets in the order in which a first batch reaches their layers; the unreached ones last."""
    return list(dict.fromkeys([*reached(model, targets, data), *range(len(targets))]))


@torch.no_grad()
def reached(model: nn.Module, targets: Sequence[Target], data: Iterable[Any]) -> list[int]:
    """The places of the targets whose layers a first batch reaches, in the order in which it does."""
    found: list[int] = []

    def note(place: int) -> Callable[..., None]:
        return lambda *_: found.append(place)

    hooks = [
        module.register_forward_pre_hook(note(place))
        for place, target in enumerate(targets)
        for module in layers_of(target)
    ]
    try:
        with failing_together(_ranks_of(model)), evaluating(model):
            for batch in data:
                call(model, batch)
                break
    finally:
        for hook in hooks:
            hook.remove()
    return list(dict.fromkeys(found))


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
    total = _Sum(where, target, by_position, bias, dtype)

    def add(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        total.add(module, _given(where, target, module, arguments, keywords))

    hooks = [module.register_forward_pre_hook(add, with_kwargs=True) for module in layers_of(target)]
    batches = _run(model, data, hooks)
    found, samples = _over_ranks(where, model, target, total.total, total.samples, batches)
    return Moments(found.mul_(2 / samples), samples)


class _Sum:
    """The sum of x x^T over what reaches a target's layers, [groups, n, n], and how many x there were."""

    def __init__(self, where: str, target: Target, by_position: bool, bias: bool, dtype: torch.dtype) -> None:
        self.where, self.target, self.by_position, self.bias = where, target, by_position, bias
        groups, n = moments_shape(target, bias)
        self.total = torch.zeros(groups, n, n, dtype=dtype, device=target.weight.device)
        self.samples = 0

    def add(self, module: nn.Module, given: Tensor) -> None:
        """Adds what a layer was called with."""
        for x in layer_inputs(module, given.to(self.total.dtype), self.by_position):
            if self.bias:
                x = functional.pad(x, (0, 1), value=1.0)
            self.total.baddbmm_(x.mT, x)
            self.samples += x.shape[1]


def moments_shape(target: Target, bias: bool) -> tuple[int, int]:
    """The sizes (groups, n) of the moments [groups, n, n] of a target's inputs, with a 1 appended where bias is."""
    return getattr(layers_of(target)[0], "groups", 1), target.weight[0].numel() + bias


@torch.no_grad()
def moments_by_owner(
    where: str,
    model: nn.Module,
    targets: Sequence[Target],
    data: Iterable[Any],
    *,
    biases: Sequence[bool],
    ranks: Ranks,
    owners: Sequence[int],
    by_position: bool = False,
    dtype: torch.dtype = torch.float64,
) -> dict[int, Moments]:
    """What input_moments gives of each target with the model as it is, from one pass over data; each on one rank.

    Ranks go through their own data, a batch each at a time, until the longest has ended. After each batch what reached
    a layer is sent, as it is, to the rank that owns its moments, which adds it up: first rank 0's, then rank 1's. So
    where rank r has data[r::count], an owner adds up what one process would, in the same order, and gets the same
    bits, if a batch gives the same bits on each rank.

    Memory holds the moments that are owned, and with several ranks what one batch puts into all of the layers.

    Args:
        where: the caller, for messages.
        model: what to run.
        targets: weights that check_layers lets pass.
        data: batches as call takes them; may be an iterator.
        biases: for each target, whether a 1 is appended to its vectors.
        ranks: every one of them must call.
        owners: for each target, the rank that keeps its moments.
        by_position: as in input_moments.
        dtype: likewise.

    Returns:
        The moments of the targets that this rank owns, by their places.

    Raises:
        ValueError: as input_moments, on every rank, whichever rank's data it was.
    """
    sums = {
        place: _Sum(where, target, by_position, biases[place], dtype)
        for place, target in enumerate(targets)
        if owners[place] == ranks.rank
    }
    layers = [layers_of(target) for target in targets]
    came: list[tuple[int, int, Tensor]] = []  # target, which of its layers, what this was called with

    def noting(place: int, layer: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def note(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            given = _given(where, targets[place], module, arguments, keywords).contiguous()
            if ranks.count == 1:
                sums[place].add(module, given)
            else:
                came.append((place, layer, given.clone()))  # what follows may change it in place

        return note

    hooks = [
        module.register_forward_pre_hook(noting(place, layer), with_kwargs=True)
        for place, modules in enumerate(layers)
        for layer, module in enumerate(modules)
    ]
    batches = 0
    try:
        with evaluating(model):
            for given in _in_step(model, data, ranks):
                told = ranks.each([(place, layer, x.shape, x.dtype) for place, layer, x in came])
                batches += given
                for source, heads in enumerate(told):
                    for index, (place, layer, shape, kind) in enumerate(heads):
                        x = came[index][2] if source == ranks.rank else None
                        if owners[place] == ranks.rank:
                            if x is None:
                                x = torch.empty(shape, dtype=kind, device=sums[place].total.device)
                                ranks.receive(x, source)
                            sums[place].add(layers[place][layer], x)
                        elif x is not None:
                            ranks.send(x, owners[place])
                came.clear()
    finally:
        for hook in hooks:
            hook.remove()
    _check_batches(where, batches)
    with failing_together(ranks.group):
        for place, each in sums.items():
            _check_sum(where, targets[place], each.total, each.samples, batches)
    return {place: Moments(each.total.mul_(2 / each.samples), each.samples) for place, each in sums.items()}


def _in_step(model: nn.Module, data: Iterable[Any], ranks: Ranks) -> Iterator[int]:
    """Runs model on a batch of each rank's data at a time, until all have ended; how many ranks had one."""
    batches = iter(data)
    while True:
        ran = False
        with failing_together(ranks.group):
            for batch in batches:
                call(model, batch)
                ran = True
                break
        if not (together := sum(ranks.each(ran))):
            return
        yield together


def _given(
    where: str, target: Target, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> Tensor:
    """What a layer is called with; refused where it is nothing to multiply with its weight.

    The layer would say so too, but its hook comes first.
    """
    given = arguments[0] if arguments else keywords["input"]
    dims = len(getattr(module, "kernel_size", ()))
    if not isinstance(given, Tensor) or given.dim() not in ((dims + 1, dims + 2) if dims else range(1, 65)):
        wanted = f"tensors of {dims + 1} or {dims + 2} dimensions" if dims else "tensors"
        came = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(
            f"{where}: data must give the layer {target.name!r} {wanted}, got {came}; pass inputs of the model"
        )
    groups, inputs = getattr(module, "groups", 1), given.shape[-1]
    if dims:
        inputs = given.shape[-1 - dims] * math.prod(cast(tuple[int, ...], module.kernel_size))
    width = target.weight[0].numel()
    if inputs != width * groups:
        raise ValueError(
            f"{where}: data must give the layer {target.name!r} inputs of {width} weights each, got "
            f"{inputs // groups}; pass samples of the model's own shape"
        )
    return given.detach()


def _run(model: nn.Module, data: Iterable[Any], hooks: Sequence[RemovableHandle]) -> int:
    """Runs model on data in evaluation mode and takes the hooks off, whatever happens; the batches there were."""
    batches = 0
    try:
        with failing_together(_ranks_of(model)), evaluating(model):
            for batch in data:
                call(model, batch)
                batches += 1
    finally:
        for hook in hooks:
            hook.remove()
    return batches


def _ranks_of(model: nn.Module) -> distributed.ProcessGroup | None:
    """Those of a DistributedDataParallel; a bare module asks nobody."""
    return model.process_group if isinstance(model, DistributedDataParallel) else None


def _over_ranks(
    where: str, model: nn.Module, target: Target, total: Tensor, samples: int, batches: int
) -> tuple[Tensor, int]:
    """The sum and its samples over all ranks of a DistributedDataParallel, checked."""
    if isinstance(model, DistributedDataParallel):
        counts = torch.tensor([samples, batches], device=total.device)
        distributed.all_reduce(counts, group=model.process_group)
        distributed.all_reduce(total, group=model.process_group)
        samples, batches = counts.tolist()
    _check_sum(where, target, total, samples, batches)
    return total, samples


def _check_sum(where: str, target: Target, total: Tensor, samples: int, batches: int) -> None:
    """Refuses sums that no input has reached, or that are not finite."""
    _check_batches(where, batches)
    if not samples:
        raise ValueError(
            f"{where}: data must reach the layer {target.name!r}, got no input there; pass samples that do, "
            f"or ignore=[{target.name!r}] where its parent reads the weight, as nn.MultiheadAttention does out_proj's"
        )
    if not bool(total.isfinite().all()):
        raise ValueError(
            f"{where}: data must give finite inputs, got NaN or infinity at the layer {target.name!r}; clean the data"
        )


def _check_batches(where: str, batches: int) -> None:
    if not batches:
        raise ValueError(f"{where}: data must hold at least one batch, got none; pass some inputs of the model")


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
