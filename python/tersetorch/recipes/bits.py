"""How many bits for which layer's shared weights: the least error within a file, or the least file within an error."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.progress import Progress
from torch import Tensor, nn

from tersetorch.methods import finalize, quantize
from tersetorch.methods.arguments import check_int, check_number
from tersetorch.methods.parametrization import release_graphs
from tersetorch.methods.prune.calibration import check_data, check_layers, input_squares
from tersetorch.methods.quantize.kmeans import MAX_BITS
from tersetorch.methods.quantize.sharing import Per
from tersetorch.methods.selection import Patterns, Target, select
from tersetorch.recipes.allocation import BudgetError, Curves, allocate
from tersetorch.recipes.cost_curves import file_bytes

# The header of a mixed choice may be so many bytes shorter than that of any one number of bits.
HEADER_SLACK = 8
BITS = tuple(range(1, MAX_BITS + 1))


@dataclass(frozen=True)
class BitsReport:
    """What share_to_budget chose.

    Attributes:
        bits: of each layer; a valid `bits` of quantize.kmeans.
        nbytes: of the file that tersetorch.save writes for the finalized model.
        error: the sum of the chosen relative errors.
        errors: for each layer, its relative squared error at each number of bits.
        layer_bytes: for each layer, what the file holds of it at each number of bits.
    """

    bits: dict[str, int]
    nbytes: int
    error: float
    errors: dict[str, dict[int, float]]
    layer_bytes: dict[str, dict[int, float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for json.dumps."""
        plain = asdict(self)
        for name in ("errors", "layer_bytes"):
            plain[name] = {layer: sorted(curve.items()) for layer, curve in plain[name].items()}
        return plain


def share_to_budget(
    model: nn.Module,
    *,
    nbytes: int | None = None,
    error: float | None = None,
    bits: Sequence[int] = BITS,
    per: Per = "tensor",
    data: Iterable[Any] | None = None,
    bfloat16: bool = False,
    targets: Patterns | None = None,
    ignore: Patterns | None = None,
    progress: Progress | None = None,
) -> BitsReport:
    """Shares the weights of model, as quantize.kmeans does, at bits chosen for each layer, in place.

    A layer's error is sum h_j (w_ij - value)^2 / sum h_j w_ij^2, with h_j = 1 or, where data are given, the mean square
    of input j: the noise of its outputs over their power, if inputs were uncorrelated. The errors add up over the
    layers. With nbytes they are the least whose file is no larger; with error the file is the smallest whose errors
    sum to no more. Both as recipes.allocation.allocate finds them from what each layer errs and takes at each number of
    bits, measured, not estimated: bytes are those of the layer in the file that tersetorch.save writes, codes as they
    are coded there. The header, a few bytes longer or shorter with other bits, is measured with the choice.

    Args:
        model: as in quantize.kmeans.
        nbytes: most bytes of the file, header and all other tensors included; at least 1.
        error: the greatest sum of errors, positive.
        bits: to choose from, each 1 to 8.
        per: as in quantize.kmeans.
        data: likewise; gone through once for each number of bits and twice more.
        bfloat16: likewise.
        targets: likewise.
        ignore: likewise.
        progress: a bar is added to it.

    Raises:
        TypeError: an argument has another type.
        ValueError: not exactly one of nbytes and error is given, an argument is out of range, no choice fits, or as
            quantize.kmeans. The model is as it was.
    """
    where = "share_to_budget"
    if (nbytes is None) == (error is None):
        raise ValueError(
            f"{where}: exactly one of nbytes and error must be given, got {'none' if nbytes is None else 'both'}; "
            "pass one"
        )
    if nbytes is not None:
        check_int(where, "nbytes", nbytes, 1)
    if error is not None:
        check_number(where, "error", error, 0, float("inf"))
        if not error > 0:
            raise ValueError(f"{where}: error must be positive, got {error}; pass the greatest sum of errors")
    if not isinstance(bits, Sequence) or isinstance(bits, str):
        raise TypeError(f"{where}: bits must be a sequence of ints, got {bits!r}; pass a list such as [4, 5]")
    if not bits:
        raise ValueError(f"{where}: bits must hold at least one number, got none; leave it out for 1 to 8")
    for width in bits:
        check_int(where, "bits", width, 1, MAX_BITS)
    grid = sorted(set(bits))
    if data is not None:
        check_data(where, data, len(grid) + 2)
    chosen = select(where, model, targets, ignore)
    importance: list[Tensor | None] = [None] * len(chosen)
    if data is not None:
        check_layers(where, chosen)
        importance = [*input_squares(where, model, chosen, data)]
    names = [target.name for target in chosen]
    release_graphs(model)

    def shared(widths: dict[str, int]) -> nn.Module:
        return quantize.kmeans(copy.deepcopy(model), widths, per=per, data=data, bfloat16=bfloat16)

    errors: dict[str, dict[int, float]] = {name: {} for name in names}
    sizes: dict[str, dict[int, float]] = {name: {} for name in names}
    headers: list[float] = []
    task = None if progress is None else progress.add_task("bytes and errors at each number of bits", total=len(grid))
    for width in grid:
        tried = shared(dict.fromkeys(names, width))
        after = select(where, tried, names, None)
        for before, target, weight in zip(chosen, after, importance, strict=True):
            errors[before.name][width] = _relative_error(before, target, weight)
        held = file_bytes(finalize(tried))
        for target in chosen:
            sizes[target.name][width] = next(held.layers[name] for name in target.names if name in held.layers)
        headers.append(held.whole - sum(sizes[name][width] for name in names))
        if progress is not None and task is not None:
            progress.advance(task)
    if nbytes is not None:
        limit, curves = nbytes - min(headers) + HEADER_SLACK, sizes
    else:
        limit, curves = error or 0.0, errors
    least = sum(min(curve.values()) for curve in curves.values())
    if nbytes is None and limit < least:
        raise ValueError(f"{where}: error must be at least {least:.6g}, the sum at the best, got {error}; raise it")
    reached: list[int] = []
    while True:
        # The last one is the smallest whatever its header takes.
        last = limit <= least
        found = _allocated(sizes if nbytes is None else errors, curves, max(limit, least))
        size = int(file_bytes(finalize(shared(found))).whole)
        if nbytes is None or size <= nbytes:
            break
        reached.append(size)
        if last:
            raise BudgetError(
                f"{where}: nbytes must be at least {min(reached)}, what the file takes at the best, got {nbytes}; "
                "raise it",
                min(reached),
            )
        # The header took more than expected; the next choice is a smaller one, by a byte or more.
        limit = sum(sizes[name][width] for name, width in found.items()) - max(1.0, (size - nbytes) / 2)
    quantize.kmeans(model, found, per=per, data=data, bfloat16=bfloat16)
    return BitsReport(found, size, sum(errors[name][width] for name, width in found.items()), errors, sizes)


def _relative_error(before: Target, after: Target, importance: Tensor | None) -> float:
    old, new = before.weight.double(), after.weight.double()
    counts = 1.0 if importance is None else importance
    power = float((counts * old.square()).sum())
    return float((counts * (new - old).square()).sum()) / power if power > 0 else 0.0


def _allocated(
    losses: dict[str, dict[int, float]], costs: dict[str, dict[int, float]], budget: float
) -> dict[str, int]:
    def floats(curves: dict[str, dict[int, float]]) -> Curves:
        return {name: {float(width): value for width, value in curve.items()} for name, curve in curves.items()}

    return {name: int(width) for name, width in allocate(floats(losses), floats(costs), budget).items()}
