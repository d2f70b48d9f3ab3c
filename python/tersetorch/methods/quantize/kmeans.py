"""Weight sharing: each layer's weights become a few values, which then train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn

from tersetorch.methods.arguments import check_choice, check_flag, check_int
from tersetorch.methods.parametrization import attach, share
from tersetorch.methods.quantize.kmeans_1d import Init, cluster
from tersetorch.methods.selection import Patterns, PerPattern, Target, assign, select

MAX_BITS = 8


def kmeans(
    model: nn.Module,
    bits: int | PerPattern[int] = 5,
    *,
    init: Init = "exact",
    targets: Patterns | None = None,
    ignore: Patterns | None = None,
    iterations: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> nn.Module:
    """Makes the weights of each layer share at most 2^bits values, in place, and returns model.

    The weights of a layer are clustered on their own, by one-dimensional k-means. Zeros, pruned or plain, stay zero
    and take entry 0, which leaves 2^bits - 1 values for the others; without zeros there are 2^bits. A layer that has
    no more distinct values than that keeps its weights to the bit. Values of clusters that end empty are left out.

    From here on the values train: the codebook, a parameter [1, entries], gets the sum of its members' gradients, and
    the weight itself is frozen. An optimizer built before the call takes the codebook into the weight's group before
    its next step (see tersetorch.methods.quantize.adopt for resumed runs and GradScaler); one built afterwards finds
    it among model.parameters(). A sum over thousands of members is large: divide the learning rate by 10 to 100 for
    plain SGD, or use an adaptive optimizer. Which weight has which value stays as it is. Sharing again clusters anew;
    pruning afterwards takes members out. finalize makes plain weights of it.

    Args:
        model: any nn.Module; its weights are float16, bfloat16, float32 or float64, of any shape.
        bits: 1 to 8; or one such number for each pattern, as prune.magnitude takes sparsity.
        init: where the iteration starts: "exact" (the least squared error there is, by dynamic programming), "linear"
            (equal steps from the least to the greatest weight), "density" (equal shares of the weights) or "random"
            (weights drawn with seed). See tersetorch.methods.quantize.kmeans_1d.cluster.
        targets: as in prune.magnitude.
        ignore: as in prune.magnitude.
        iterations: most rounds of Lloyd's iteration a layer, at least 1; it stops when nothing moves.
        seed: of init "random", at least 0; the same seed gives the same codes.
        progress: shows a bar that counts layers.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is outside its range, a pattern matches nothing, or a weight cannot be shared, as in
            prune.magnitude. The model is as it was.

    Source:
        Han, Mao, Dally, Deep Compression (2016), sections 3.1 to 3.3. Where we differ: the paper starts from "linear",
        which keeps large weights apart; "exact" does so too where that lowers the error, owes nothing to luck, and lost
        the least accuracy on LeNet-300-100 at 2 bits. From 3 bits on, training the values levels all four.
    """
    where = "quantize.kmeans"
    check_choice(where, "init", init, get_args(Init))
    check_int(where, "iterations", iterations, 1)
    check_int(where, "seed", seed, 0)
    check_flag(where, "progress", progress)
    chosen = _choose(where, model, bits, targets, ignore)
    shown = track(chosen, "sharing weights") if progress else chosen
    shared = [_cluster(target, width, init, iterations, seed + index) for index, (target, width) in enumerate(shown)]
    for (target, _), (mask, codes, codebook) in zip(chosen, shared, strict=True):
        attach(target.owners).mask.copy_(mask)
        share(target.owners, codes, codebook)
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


def _cluster(target: Target, bits: int, init: Init, iterations: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The mask, the codes (uint8) and the codebook [1, entries] that share the weight of target."""
    weight = target.weight
    mask = weight != 0
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    survivors = weight[mask].to("cpu", wide).numpy()
    zeros = survivors.size < weight.numel() or not weight.numel()
    codes = torch.zeros_like(weight, dtype=torch.uint8)
    values = np.zeros(int(zeros))
    if survivors.size:
        clusters = cluster(survivors, 2**bits - zeros, init, iterations=iterations, seed=seed)
        codes[mask] = torch.from_numpy(clusters.codes(survivors)).to(weight.device) + int(zeros)
        values = np.concatenate((values, clusters.centroids))
    return mask, codes, torch.from_numpy(values)[None].to(weight.device, wide)
