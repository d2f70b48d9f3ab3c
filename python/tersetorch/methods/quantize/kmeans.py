"""Weight sharing: each layer's weights become a few values, which then train."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args

from rich.progress import Progress
from torch import Tensor, nn

from tersetorch.methods.arguments import check_choice, check_flag, check_int
from tersetorch.methods.parametrization import attach, share
from tersetorch.methods.prune.calibration import check_data, check_layers, input_squares
from tersetorch.methods.quantize.kmeans_1d import Init
from tersetorch.methods.quantize.sharing import Per, count_groups, share_values
from tersetorch.methods.selection import Patterns, PerPattern, Target, assign, select

MAX_BITS = 8


def kmeans(
    model: nn.Module,
    bits: int | PerPattern[int] = 5,
    *,
    per: Per = "tensor",
    data: Iterable[Any] | None = None,
    bfloat16: bool = False,
    init: Init = "exact",
    targets: Patterns | None = None,
    ignore: Patterns | None = None,
    iterations: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> nn.Module:
    """Makes the weights of each layer, row or block of columns share at most 2^bits values, in place; returns model.

    The weights that share are clustered on their own, by one-dimensional k-means. Zeros, pruned or plain, stay zero
    and take entry 0, which leaves 2^bits - 1 values for the others; without zeros in the layer there are 2^bits. What
    has no more distinct values than that keeps its weights to the bit. Values of clusters that end empty are left out.

    From here on the values train: the codebook, a parameter [groups, entries], gets the sum of its members' gradients,
    and the weight itself is frozen. An optimizer built before the call takes the codebook into the weight's group
    before its next step (see tersetorch.methods.quantize.adopt for resumed runs and GradScaler); one built afterwards
    finds it among model.parameters(). A sum over thousands of members is large: divide the learning rate by 10 to 100
    for plain SGD, or use an adaptive optimizer. Which weight has which value stays as it is. Sharing again clusters
    anew; pruning afterwards takes members out. finalize makes plain weights of it.

    Args:
        model: any nn.Module; its weights are float16, bfloat16, float32 or float64, of any shape.
        bits: 1 to 8; or one such number for each pattern, as prune.magnitude takes sparsity.
        per: what has values of its own: "tensor", "row" (an output), or a number of columns, at least 1, of the weight
            as a matrix [out, rest]; the last block has what is left.
        data: inputs, as prune.obs takes them: the error of a weight then counts as the mean square of what it is
            multiplied with, so that sum h_j (w_ij - value)^2 is least with h_j = mean x_j^2, taken in one pass of the
            model in eval mode. Layers are Linear or Conv then. A weight whose input is always 0 counts a millionth.
        bfloat16: the values are rounded to bfloat16, those of the least error, and stay so: they train as if they were
            float32, and the weight has them rounded, before and after finalize. Kernels that multiply in bfloat16 are
            then exact.
        init: where the iteration starts: "exact" (the least squared error there is, by dynamic programming), "linear"
            (equal steps from the least to the greatest weight), "density" (equal shares of the weights) or "random"
            (weights drawn with seed). See tersetorch.methods.quantize.kmeans_1d.cluster.
        targets: as in prune.magnitude.
        ignore: as in prune.magnitude.
        iterations: most rounds of Lloyd's iteration a group, at least 1; it stops when nothing moves.
        seed: of init "random", at least 0; the same seed gives the same codes.
        progress: shows a bar that counts groups.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is outside its range, a pattern matches nothing, data is empty, does not reach a layer or
            is not finite, or a weight cannot be shared, as in prune.magnitude. The model is as it was.

    Source:
        Han, Mao, Dally, Deep Compression (2016), sections 3.1 to 3.3. Where we differ: the paper starts from "linear",
        which keeps large weights apart; "exact" does so too where that lowers the error, owes nothing to luck, and lost
        the least accuracy on LeNet-300-100 at 2 bits. From 3 bits on, training the values levels all four. Choi et al.,
        Towards the limit of network quantization (2017), section 4, for weighted errors; there by second derivatives.
    """
    where = "quantize.kmeans"
    if not isinstance(per, str):
        check_int(where, "per", per, 1)
    else:
        check_choice(where, "per", per, ("tensor", "row"))
    if data is not None:
        check_data(where, data, 1)
    check_flag(where, "bfloat16", bfloat16)
    check_choice(where, "init", init, get_args(Init))
    check_int(where, "iterations", iterations, 1)
    check_int(where, "seed", seed, 0)
    check_flag(where, "progress", progress)
    chosen = _choose(where, model, bits, targets, ignore)
    weighted: list[Tensor | None] = [None] * len(chosen)
    if data is not None:
        check_layers(where, [target for target, _ in chosen])
        weighted = [*input_squares(where, model, [target for target, _ in chosen], data)]
    shared = []
    with Progress(disable=not progress) as bar:
        task = bar.add_task("sharing weights", total=sum(count_groups(each.weight.shape, per) for each, _ in chosen))
        for index, ((target, width), importance) in enumerate(zip(chosen, weighted, strict=True)):
            weight = target.weight
            mask = weight != 0
            found = share_values(
                weight,
                mask,
                2**width,
                per,
                init=init,
                iterations=iterations,
                seed=seed + index,
                importance=importance,
                bfloat16=bfloat16,
                advance=lambda: bar.advance(task),
            )
            shared.append((mask, *found))
    for (target, _), (mask, codes, codebook) in zip(chosen, shared, strict=True):
        attach(target.owners).mask.copy_(mask)
        share(target.owners, codes, codebook, per if isinstance(per, int) else 0, bfloat16)
    return model


def _choose(
    where: str, model: nn.Module, bits: int | PerPattern[int], targets: Patterns | None, ignore: Patterns | None
) -> list[tuple[Target, int]]:
    if not isinstance(bits, Mapping):
        check_int(where, "bits", bits, 1, MAX_BITS)
        return [(target, bits) for target in select(where, model, targets, ignore)]
    if targets is not None:
        raise ValueError(
            f"{where}: bits must be one number where targets is given, got a mapping; leave one of them out"
        )
    for pattern, width in bits.items():
        check_int(where, f"bits[{pattern!r}]", width, 1, MAX_BITS)
    return assign(where, "bits", model, bits, ignore)
