"""Optimal Brain Surgeon and its descendants: the weights that stay make up for those that go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from rich.progress import Progress
from torch import Tensor, nn

from tersetorch.methods.arguments import check_choice, check_flag, check_int, check_model, check_number
from tersetorch.methods.distributed import check_alike, failing_together
from tersetorch.methods.parametrization import attach, live_weight, share
from tersetorch.methods.prune.blocked_obs import blocked_obs
from tersetorch.methods.prune.calibration import (
    Moments,
    check_data,
    check_layers,
    in_order_of_use,
    input_moments,
    layers_of,
    moments_by_owner,
    moments_shape,
    parameter_of,
)
from tersetorch.methods.prune.coordinate_descent import descend
from tersetorch.methods.prune.exact_obs import exact_obs
from tersetorch.methods.prune.layerwise_obs import layerwise_obs
from tersetorch.methods.prune.least_squares import damped, inverse, relative_error
from tersetorch.methods.prune.magnitude import Sparsity, apply_masks, choose
from tersetorch.methods.prune.obs_ranks import ALONE, Ranks
from tersetorch.methods.prune.optimal_brain_surgeon import DeletedWeight, full_obs
from tersetorch.methods.prune.patterns import BlockPattern, GroupPattern, Pattern, parse
from tersetorch.methods.quantize.kmeans_1d import cluster
from tersetorch.methods.selection import Patterns, PerPattern, Target, assign

# How prune.obs finds what goes.
Solver = Literal["full", "layerwise", "exactobs", "blocked"]

DAMPING = 0.01
ALPHA = 1e-4
MAX_BITS = 8


@dataclass(frozen=True)
class LayerError:
    """What pruning did to one layer's outputs on the calibration data.

    Attributes:
        layer: its name.
        kept: weights that are not zero.
        total: all weights.
        samples: input vectors that the layer was calibrated on.
        before: ||(W' - W) X||^2 / ||W X||^2 when the weights that go are only set to zero.
        after: the same once the others have made up for them (and were rounded, where bits is given).
    """

    layer: str
    kept: int
    total: int
    samples: int
    before: float
    after: float


def obs(
    model: nn.Module,
    data: Iterable[Any],
    sparsity: Sparsity | None = None,
    *,
    solver: Solver = "blocked",
    pattern: str | None = None,
    damping: float | None = None,
    block_size: int = 16,
    bits: int | PerPattern[int] | None = None,
    refine: int = 0,
    max_increase: float | None = None,
    one_pass: bool = False,
    dtype: torch.dtype = torch.float64,
    targets: Patterns | None = None,
    ignore: Patterns | None = None,
    history: list[LayerError | DeletedWeight] | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Prunes by second derivatives, in place, and returns model: what stays is changed to make up for what goes.

    "full" takes the network as a whole: its error is the mean over the data of half the squared change of the outputs,
    with H = alpha I + (1/P) sum X X^T over the gradients X of the outputs. Least L_q = w_q^2 / (2 [H^-1]_qq) goes
    first, and all weights of the targets and their biases change by -w_q / [H^-1]_qq H^-1 e_q. For small networks.
    H is that of the network at the call: for many deletions call again at rising sparsities, retraining in between.

    The others take layer after layer, in the order in which data runs through them, so that each is calibrated on the
    outputs of those that are pruned already. With x a layer's inputs on the data, H = (2/N) sum x x^T, and a row w of
    its weight costs (w' - w)^T H (w' - w). Memory holds one layer's H, and a copy of the weights.

    | solver | deletes | for |
    |---|---|---|
    | "layerwise" | in the order of one ranking, H^-1 as it is; updates the bias too, if it trains | any layer |
    | "exactobs" | one at a time, the cheapest at each moment | rows x inputs^3 operations: up to 1,000 inputs |
    | "blocked" | column by column, in one sweep | inputs^3 operations: any layer |

    Where "exactobs" is not too slow it loses least, by far on small layers and at high sparsity.

    What goes is masked as by prune.magnitude, which says how pruning adds up and trains on. Weights that are zero
    already stay zero and count. Biases are never pruned. Half precision is computed in dtype and rounded at the end.
    Batch norm statistics stay as they are: prune.recalibrate_batch_norm takes them anew. Where anything is refused or
    fails half-way, the model is as it was.

    With one_pass all layers are calibrated together on the model as it is, by one pass over the data instead of one for
    each layer: faster, but no layer then makes up for what pruning the others does to its inputs. Memory holds the H of
    all. Several calls, with the targets of a block of layers each, are between the two.

    Given a DistributedDataParallel, on every rank, all ranks calibrate on the data of all and prune the same ("full"
    does not: give every rank the same data), and what goes wrong on one is raised on all. With one_pass each layer is
    owned by one rank, which alone holds its H and prunes it, so that a rank's memory holds about the part of one in
    the number of ranks; where rank r has batches[r::ranks], and a batch gives the same on each, the bits are those of
    one process with all batches. Otherwise H is summed over the ranks, which is so up to rounding, in the order in
    which rank 0's data runs through the layers. A layer's rows are then shared out over the ranks by "exactobs" and
    "layerwise", with the bits that one process gets from the same H; the sweep of "blocked" chooses among all rows at
    once, and each rank does all of it. The bare module is pruned by the data of the calling rank alone.

    Args:
        model: any nn.Module; run in eval mode, with no gradients but for "full". Its Linear and Conv layers can be
            pruned, tied ones too (their inputs are summed), but not while a codebook shares them.
        data: an iterable of batches, gone through once for each layer (twice with "full", once with one_pass), so that
            an iterator serves only one layer, or one_pass. A batch is one input; a tuple or list (inputs..., target),
            whose last entry is not looked at where there are several; or a dict of keyword arguments. A few hundred
            samples do.
        sparsity: as in prune.magnitude; one number with "full", which ranks all weights together. Left out with a
            pattern N:M, and optional beside max_increase.
        solver: as above.
        pattern: as in prune.magnitude; not with "full".
        damping: at least 0. Added to the diagonal of H: this part of its mean, 0.01 unless given; with "full" alpha
            itself, more than 0, 1e-4 unless given.
        block_size: of "blocked", at least 1: columns for which it chooses at a time. SparseGPT has 128 of thousands of
            columns; a layer of 128 would choose all at once. On one with 128 correlated inputs, 80 % pruned, blocks of
            16 lost 0.21 of the output's power, of 128 0.27 and magnitude 0.35; smaller ones gain little.
        bits: of "blocked", 1 to 8: the weights that stay are also rounded, in the same sweep, onto 2^bits values with
            zero (as kmeans clusters those that pruning alone would leave; with refine each counts its H_jj, as
            quantize.kmeans counts them with data), which the layer then shares as quantize.kmeans has it. Or one such
            number for each pattern, as sparsity; layers that none names are not rounded.
        refine: of "blocked", at least 0: rounds after the sweep in which each weight that stays takes, one column after
            the other, the value that is best given all others (of the shared ones, where bits is given). On the layers
            of a sentence transformer, half pruned with 4 bits, 3 rounds took a sixth to two fifths off the error
            on text that was not calibrated on; further rounds gain little.
        max_increase: of "full": stops before the sum of the L_q, the predicted rise of the error, exceeds it.
        one_pass: calibrate all layers together; not with "full".
        dtype: torch.float64 or float32, of H and of the weights while they are worked on; "full" is float64 always.
        targets: as in prune.magnitude.
        ignore: as in prune.magnitude.
        history: gets a LayerError for each layer, or with "full" a DeletedWeight for each weight, in order (with
            one_pass, that of the model's layers).
        progress: a bar is added to it.

    Raises:
        TypeError: an argument has the wrong type, or data is an iterator and has to be gone through again.
        ValueError: a number is outside its range, a pattern matches nothing, a weight cannot be pruned, data is empty,
            does not reach a layer (nn.MultiheadAttention reads its out_proj's weight itself: ignore it) or gives NaN
            or infinity, H cannot be inverted, the network is too large for "full", or the ranks of a
            DistributedDataParallel were given other arguments.

    Source:
        Hassibi and Stork, Optimal Brain Surgeon (1993); Dong, Chen, Pan, layer-wise OBS (2017); Frantar, Singh,
        Alistarh, Optimal Brain Compression (2022); Frantar and Alistarh, SparseGPT (2023); Behdin et al., QuantEase
        (2023), for refine. The solvers' files say where we differ.
    """
    where = "prune.obs"
    check_model(where, model)
    ranks = Ranks.of(model)
    with failing_together(ranks.group):
        check_choice(where, "solver", solver, get_args(Solver))
        form = parse(where, pattern)
        _check(where, solver, sparsity, form, damping, block_size, bits, refine, max_increase, one_pass, dtype, history)
        asked = 0.0 if sparsity is None and max_increase is not None else sparsity
        every = choose(where, model, asked, "layer", targets, ignore, form)
        chosen = [(target, part) for target, part in every if target.weight.numel()]
        pruned = [target for target, _ in chosen]
        _check_targets(where, pruned, form, solver)
        widths = _widths(where, model, bits, [target for target, _ in every])
        passes = {"full": 2}.get(solver, 1 if one_pass else len(pruned) + (len(pruned) > 1))
        check_data(where, data, passes)
    parts = [(target.name, part) for target, part in chosen]
    settings = (parts, solver, pattern, damping, block_size, widths, refine, max_increase, one_pass, dtype)
    check_alike(where, "the layers and arguments", settings, ranks.group)
    steps = 1 if solver == "full" else len(pruned)
    tick = _ticker(progress, steps, "sharing weights" if bits is not None and sparsity == 0 else "pruning")
    notes: Sequence[LayerError | DeletedWeight]
    codebooks: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.no_grad(), _all_or_nothing(pruned):
        if solver == "full" and pruned:
            part = None if sparsity is None else chosen[0][1]
            alpha = ALPHA if damping is None else damping
            masks, notes = full_obs(where, model, pruned, data, alpha, part, max_increase, tick)
        else:
            plan = _Plan(solver, form, DAMPING if damping is None else damping, block_size, widths, refine, dtype)
            prune = _together if one_pass else _by_layer
            masks, notes, codebooks = prune(where, model, chosen, data, plan, tick)
    apply_masks(chosen, masks)
    for target, _ in every:
        attach(target.owners)  # one without weights too, as prune.magnitude does
        if target.name in codebooks:
            share(target.owners, *codebooks[target.name])
    if history is not None:
        history.extend(notes)
    tick(steps)
    return model


@dataclass(frozen=True)
class _Plan:
    """The arguments of obs that are the same for every layer, and bits by layer."""

    solver: Solver
    pattern: Pattern
    damping: float
    block_size: int
    bits: Mapping[str, int]
    refine: int
    dtype: torch.dtype

    @property
    def by_position(self) -> bool:
        """Whether a kernel's inputs are ordered with channels innermost, where N:M takes its groups."""
        return isinstance(self.pattern, GroupPattern)


@dataclass(frozen=True)
class _Pruned:
    """A layer's new weight, what is kept of it, its new bias, its codes and codebook, and the error."""

    weight: Tensor
    keep: Tensor
    bias: Tensor | None
    shared: tuple[Tensor, Tensor] | None
    error: LayerError

    def write(self, target: Target) -> None:
        """Puts weight and bias into the layer."""
        parameter_of(target).copy_(self.weight)
        if self.bias is not None:
            cast(Tensor, target.owners[0][0].bias).copy_(self.bias)

    @classmethod
    def of_owner(cls, own: _Pruned | None, owner: int, ranks: Ranks, device: torch.device) -> _Pruned:
        """What rank owner has, on every rank."""
        optional: list[Tensor | None] = [None, None, None]
        if own is not None:
            optional = [own.bias, *(own.shared or (None, None))]
        there = [each for each in optional if each is not None]
        note = None if own is None else (own.error, [each is not None for each in optional])
        held = [] if own is None else [own.weight, own.keep, *there]
        (error, given), (weight, keep, *rest) = ranks.of_owner(owner, note, held, device)
        bias, codes, codebook = (rest.pop(0) if present else None for present in given)
        shared = None if codes is None or codebook is None else (codes, codebook)
        return cls(weight, keep, bias, shared, error)


def _by_layer(
    where: str,
    model: nn.Module,
    chosen: Sequence[tuple[Target, float]],
    data: Iterable[Any],
    plan: _Plan,
    tick: Callable[[float], None],
) -> tuple[list[Tensor], list[LayerError], dict[str, tuple[Tensor, Tensor]]]:
    """Prunes each layer in place, in the order of use; the masks in the order of chosen, the errors, the codebooks."""
    order: Sequence[int] = [0][: len(chosen)]
    if len(chosen) > 1:
        found = in_order_of_use(model, [target for target, _ in chosen], data)
        order = Ranks.of(model).of_rank_0(found, chosen[0][0].weight.device)
    results: dict[int, _Pruned] = {}
    for place in order:

        def report(part: float, done: int = len(results)) -> None:
            tick(done + part)

        target, sparsity = chosen[place]
        bias = _bias(model, target, plan)
        moments = input_moments(
            where, model, target, data, by_position=plan.by_position, bias=bias is not None, dtype=plan.dtype
        )
        report(0.5)
        results[place] = result = _prune_layer(
            where, target, sparsity, bias, moments, plan, Ranks.of(model), lambda part: report(0.5 + part / 2)
        )
        result.write(target)
    return _told(chosen, results)


def _together(
    where: str,
    model: nn.Module,
    chosen: Sequence[tuple[Target, float]],
    data: Iterable[Any],
    plan: _Plan,
    tick: Callable[[float], None],
) -> tuple[list[Tensor], list[LayerError], dict[str, tuple[Tensor, Tensor]]]:
    """The same with all layers calibrated on the model as it is, each by the rank that owns it."""
    ranks = Ranks.of(model)
    targets = [target for target, _ in chosen]
    biases = [_bias(model, target, plan) for target in targets]
    shapes = [moments_shape(target, bias is not None) for target, bias in zip(targets, biases, strict=True)]
    owners = ranks.owners([groups * n * n for groups, n in shapes])
    moments = moments_by_owner(
        where,
        model,
        targets,
        data,
        biases=[bias is not None for bias in biases],
        ranks=ranks,
        owners=owners,
        by_position=plan.by_position,
        dtype=plan.dtype,
    )
    tick(len(chosen) / 2)
    results: dict[int, _Pruned] = {}
    with failing_together(ranks.group):
        while moments:
            place = next(iter(moments))

            def report(part: float, done: int = len(results)) -> None:
                tick(len(chosen) * (0.5 + (done + part) / (done + len(moments) + 1) / 2))

            target, sparsity = chosen[place]
            results[place] = _prune_layer(
                where, target, sparsity, biases[place], moments.pop(place), plan, ALONE, report
            )
    for place, owner in enumerate(owners):
        results[place] = _Pruned.of_owner(results.get(place), owner, ranks, targets[place].weight.device)
        results[place].write(targets[place])
    return _told(chosen, dict(sorted(results.items())))


def _told(
    chosen: Sequence[tuple[Target, float]], results: Mapping[int, _Pruned]
) -> tuple[list[Tensor], list[LayerError], dict[str, tuple[Tensor, Tensor]]]:
    """The masks in the order of chosen, the errors in that of results, and the codebooks."""
    codebooks = {chosen[place][0].name: each.shared for place, each in results.items() if each.shared is not None}
    masks = [results[place].keep for place in range(len(chosen))]
    return masks, [each.error for each in results.values()], codebooks


def _prune_layer(
    where: str,
    target: Target,
    sparsity: float,
    held: nn.Parameter | None,
    moments: Moments,
    plan: _Plan,
    ranks: Ranks,
    tick: Callable[[float], None],
) -> _Pruned:
    """A layer's new weight by its moments, and its bias where the moments have a place for it."""
    by_position = plan.by_position
    hessian = damped(moments.hessian, plan.damping)
    inverted = inverse(where, target.name, hessian)
    weight = target.weight
    w = _matrix(weight, len(hessian), by_position).to(plan.dtype)
    bias, moved, shared = None, None, None
    if plan.solver == "layerwise":
        bias = None if held is None else held.detach().to(plan.dtype).view(w.shape[:2])
        found, keep, moved = layerwise_obs(w, inverted, bias, sparsity, plan.pattern, tick, ranks)
    elif plan.solver == "exactobs":
        found, keep = exact_obs(w, hessian, inverted, sparsity, plan.pattern, tick, ranks)
    else:
        found, keep = blocked_obs(w, inverted, sparsity, plan.pattern, plan.block_size, tick)
        bits = plan.bits.get(target.name)
        if bits is not None:
            # The sweep that pruned says which values the layer needs; a second one, of the same choice, rounds to them.
            counts = hessian.diagonal(dim1=1, dim2=2)[:, None].expand_as(w) if plan.refine else None
            levels = _levels(found, keep, bits, weight.dtype, counts)
            bounds = ((levels[1:] + levels[:-1]) / 2).to(plan.dtype)

            def rounding(column: Tensor) -> Tensor:
                return levels.to(plan.dtype)[torch.bucketize(column.contiguous(), bounds)]

            found, keep = blocked_obs(
                w,
                inverted,
                sparsity,
                plan.pattern,
                plan.block_size,
                tick,
                keep,
                rounding,
            )
            found = descend(found, keep, w, hessian, plan.refine, rounding)
            codes = torch.bucketize(found, bounds).masked_fill_(~keep, -1)
            if not bool(keep.all()):
                codes, levels = codes + 1, torch.cat([levels.new_zeros(1), levels])
            shared = _shaped(codes.to(torch.uint8), weight.shape, by_position), levels[None]
        else:
            found = descend(found, keep, w, hessian, plan.refine)
    rounded = found.to(weight.dtype).to(plan.dtype)
    changes = [torch.where(keep, 0, -w), rounded - w]
    if bias is not None and moved is not None:
        moved = moved.to(weight.dtype)
        still = torch.zeros_like(bias)
        shifts = still, moved.to(plan.dtype) - bias
        changes = [torch.cat([change, shift[..., None]], -1) for change, shift in zip(changes, shifts, strict=True)]
    before, after = (relative_error(change, w, moments.hessian) for change in changes)
    kept = int(rounded.count_nonzero())
    return _Pruned(
        _shaped(rounded, weight.shape, by_position).to(weight.dtype),
        _shaped(keep, weight.shape, by_position),
        None if moved is None else moved.flatten(),
        shared,
        LayerError(target.name, kept, weight.numel(), moments.samples, before, after),
    )


def _bias(model: nn.Module, target: Target, plan: _Plan) -> nn.Parameter | None:
    """The bias that changes with the weight, of a layer that shares neither with another, unless it is frozen."""
    if plan.solver != "layerwise":
        return None
    layers = layers_of(target)
    bias = layers[0]._parameters.get("bias") if len(layers) == 1 else None
    holders = sum(held is bias for module in model.modules() for held in module._parameters.values())
    return None if bias is None or not bias.requires_grad or holders > 1 else bias


def _levels(weights: Tensor, keep: Tensor, bits: int, dtype: torch.dtype, counts: Tensor | None) -> Tensor:
    """The values that the kept weights are clustered to, rising, with room for zero where something is pruned.

    Each weight's squared error counts as counts says, or 1.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    survivors = weights[keep].to("cpu", wide).numpy()
    if not survivors.size:
        return torch.zeros(1, dtype=wide, device=weights.device)
    weighted = None if counts is None else counts[keep].double().cpu().numpy()
    clusters = cluster(survivors, 2**bits - (not bool(keep.all())), weights=weighted)
    return torch.from_numpy(clusters.centroids).to(weights.device, wide)


def _matrix(weight: Tensor, groups: int, by_position: bool) -> Tensor:
    """[groups, rows, n] of a weight; by_position with input channels innermost."""
    inner = weight.movedim(1, -1) if by_position else weight
    return inner.reshape(groups, len(weight) // groups, -1)


def _shaped(matrix: Tensor, shape: torch.Size, by_position: bool) -> Tensor:
    """What _matrix was made of."""
    if not by_position:
        return matrix.reshape(shape)
    return matrix.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()


@contextmanager
def _all_or_nothing(targets: Sequence[Target]) -> Iterator[None]:
    """Puts weights and biases back where what it surrounds does not come to its end."""
    held = [parameter_of(target) for target in targets]
    held += [
        bias
        for target in targets
        for module, _ in target.owners
        if (bias := module._parameters.get("bias")) is not None
    ]
    before = [(parameter, parameter.detach().clone()) for parameter in held]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, values in before:
                parameter.copy_(values)
        raise


def _ticker(progress: Progress | None, total: int, words: str) -> Callable[[float], None]:
    """What moves a bar that is added to progress: it is told how much of the total is done."""
    if progress is None:
        return lambda done: None
    task = progress.add_task(words, total=total)
    return lambda done: progress.update(task, completed=done)


def _check(
    where: str,
    solver: str,
    sparsity: Sparsity | None,
    pattern: Pattern,
    damping: float | None,
    block_size: int,
    bits: int | PerPattern[int] | None,
    refine: int,
    max_increase: float | None,
    one_pass: bool,
    dtype: torch.dtype,
    history: object,
) -> None:
    full = solver == "full"
    check_flag(where, "one_pass", one_pass)
    if full and one_pass:
        raise ValueError(f"{where}: one_pass must be left out with solver 'full', got True; pass another solver")
    if full and pattern is not None:
        raise ValueError(f"{where}: pattern must be left out with solver 'full', got one; pass another solver")
    if full and isinstance(sparsity, Mapping):
        raise ValueError(f"{where}: sparsity must be one number with solver 'full', got a mapping; pass a number")
    if max_increase is not None:
        if not full:
            raise ValueError(f"{where}: max_increase must be left out with solver {solver!r}, got one; pass sparsity")
        check_number(where, "max_increase", max_increase, 0, math.inf)
    grouped = isinstance(pattern, GroupPattern)
    if grouped and sparsity is not None:
        raise ValueError(f"{where}: sparsity must be left out with a pattern N:M, got both; leave one of them out")
    if sparsity is None and not grouped and max_increase is None:
        other = "max_increase" if full else "a pattern N:M"
        raise ValueError(f"{where}: sparsity must be given, got neither it nor {other}; pass a number such as 0.5")
    if damping is not None:
        check_number(where, "damping", damping, 0, math.inf)
        if full and damping == 0:
            raise ValueError(f"{where}: damping must be more than 0 with solver 'full', got 0; leave it out")
    check_int(where, "block_size", block_size, 1)
    if bits is not None:
        if solver != "blocked":
            raise ValueError(
                f"{where}: bits must be left out with solver {solver!r}, got {bits}; pass solver='blocked'"
            )
        if isinstance(bits, Mapping):
            for name, width in bits.items():
                check_int(where, f"bits[{name!r}]", width, 1, MAX_BITS)
        else:
            check_int(where, "bits", bits, 1, MAX_BITS)
    check_int(where, "refine", refine, 0)
    if refine and solver != "blocked":
        raise ValueError(f"{where}: refine must be 0 with solver {solver!r}, got {refine}; pass solver='blocked'")
    if dtype not in (torch.float64, torch.float32):
        raise ValueError(f"{where}: dtype must be torch.float64 or torch.float32, got {dtype}; pass one of these")
    if history is not None and not isinstance(history, list):
        raise TypeError(f"{where}: history must be a list, got {type(history).__name__}; pass one to be appended to")


def _widths(
    where: str, model: nn.Module, bits: int | PerPattern[int] | None, pruned: Sequence[Target]
) -> dict[str, int]:
    """The bits of each layer that is rounded."""
    names = [target.name for target in pruned]
    if not isinstance(bits, Mapping):
        return {} if bits is None else dict.fromkeys(names, bits)
    widths = {target.name: width for target, width in assign(where, "bits", model, bits, None)}
    other = next((name for name in widths if name not in names), None)
    if other is not None:
        raise ValueError(f"{where}: bits must name layers that are pruned, got {other!r}; add it to sparsity, with 0")
    return widths


def _check_targets(where: str, targets: Sequence[Target], pattern: Pattern, solver: str) -> None:
    for target in targets:
        live = live_weight(*target.owners[0])
        problem = None
        if live is not None and live.compressed.codebook is not None:
            problem = "must not be shared, got one with a codebook; finalize first"
        elif live is not None and len(live.held) > 1:
            problem = f"must have no other parametrization, got {type(live.held[1]).__name__}; remove that one"
        if problem is not None:
            raise ValueError(f"{where}: the weight of {target.name!r} {problem}, or pass ignore=[{target.name!r}]")
    if solver == "full":
        return
    check_layers(where, targets)
    for target in targets:
        groups = getattr(layers_of(target)[0], "groups", 1)
        rows = len(target.weight) // groups
        if isinstance(pattern, BlockPattern) and groups > 1 and rows % pattern.rows:
            raise ValueError(
                f"{where}: blocks must divide the {rows} outputs of a convolution group, got {pattern.rows} rows for "
                f"{target.name!r}; pass ignore=[{target.name!r}]"
            )
