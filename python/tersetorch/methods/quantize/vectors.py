"""tt.quantize.product and .residual: layers' weights become few shared sub-vectors, which then train."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from tersetorch.methods.arguments import check_flag, check_int
from tersetorch.methods.parametrization import attach, share
from tersetorch.methods.prune.calibration import check_data, check_layers, input_moments
from tersetorch.methods.quantize.product import product_quantize, segment_width
from tersetorch.methods.quantize.residual import residual_quantize
from tersetorch.methods.selection import Patterns, Target, select
from tersetorch.methods.vector_codes import MAX_ENTRIES, VectorCodes

Quantize = Callable[[Tensor, int, Tensor | None, int, Callable[[int], object]], VectorCodes]


def product(
    model: nn.Module,
    entries: int = 256,
    *,
    segments: int | None = None,
    sub_vector: int | None = None,
    shared: bool = False,
    data: Iterable[Any] | None = None,
    targets: Patterns | None = None,
    ignore: Patterns | None = None,
    seed: int = 0,
    progress: bool = False,
) -> nn.Module:
    """Makes each layer's weight a product of few sub-vectors, in place, and returns model.

    The weight as a matrix [out, rest] is cut into segments of columns; in each, the rows share at most `entries`
    sub-vectors, found by k-means (see quantize.product_quantize). A layer with fewer rows than that has one for each
    row. Zeros are numbers like any other here: a pruned weight does not stay sparse.

    From here on the codebooks train and the codes stay, as after quantize.kmeans; finalize makes plain weights of it.
    nn.ProductLinear.from_dense takes codes and codebooks over and computes with them: call it before finalize.

    Args:
        model: any nn.Module; weights as quantize.kmeans takes them.
        entries: of each codebook, 1 to 256.
        segments: how many parts each row is cut into; or
        sub_vector: how many columns each part has. One of the two; 4 columns where both are left out.
        shared: whether a layer's segments share one codebook.
        data: inputs, as prune.obs takes them: the error that is lowered is then that of the segments' outputs, by the
            second moments of what they are multiplied with; a pass over data for each layer. Layers are Linear, or Conv
            without groups, then.
        targets: as in prune.magnitude.
        ignore: as in prune.magnitude.
        seed: at least 0; the same seed gives the same codes.
        progress: shows a bar that counts segments.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is outside its range or does not fit a layer, a pattern matches nothing, data does not do,
            or a weight cannot be shared, as in quantize.kmeans. The model is as it was.

    Source:
        Gong, Liu, Yang, Bourdev, Compressing deep convolutional networks using vector quantization (2014), section 3.3.
    """
    where = "quantize.product"
    check_flag(where, "shared", shared)
    if shared and data is not None:
        raise ValueError(f"{where}: shared must be False where data is given, got both; leave one of them out")

    def quantize(
        weight: Tensor, count: int, moments: Tensor | None, seed: int, advance: Callable[[int], object]
    ) -> VectorCodes:
        return product_quantize(
            weight,
            count,
            segments=segments,
            sub_vector=sub_vector,
            shared=shared,
            moments=moments,
            seed=seed,
            advance=advance,
        )

    def steps(target: Target) -> int:
        columns = target.weight.flatten(1).shape[1]
        try:
            return -(-columns // segment_width(f"{where}: {target.name}", columns, segments, sub_vector))
        except ValueError as error:
            raise ValueError(f"{error}, or ignore=[{target.name!r}]") from error

    return _apply(where, model, entries, quantize, steps, data, targets, ignore, seed, progress)


def residual(
    model: nn.Module,
    stages: int = 2,
    entries: int = 256,
    *,
    beam: int = 8,
    data: Iterable[Any] | None = None,
    targets: Patterns | None = None,
    ignore: Patterns | None = None,
    seed: int = 0,
    progress: bool = False,
) -> nn.Module:
    """Makes each row of each layer's weight a sum of shared rows, in place, and returns model.

    A row takes one entry from each of `stages` codebooks, which are as wide as the weight (see
    quantize.residual_quantize). As quantize.product otherwise; nn.ResidualLinear.from_dense takes the codes over.

    Args:
        model: any nn.Module; weights as quantize.kmeans takes them.
        stages: at least 1.
        entries: of each codebook, 1 to 256; a layer with fewer rows has one for each row.
        beam: how many beginnings of a row's codes are followed at a time, at least 1.
        data: as in quantize.product; the error is that of the layer's outputs.
        targets: as in prune.magnitude.
        ignore: as in prune.magnitude.
        seed: at least 0; the same seed gives the same codes.
        progress: shows a bar that counts stages.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: as quantize.product. The model is as it was.

    Source:
        Gong, Liu, Yang, Bourdev, Compressing deep convolutional networks using vector quantization (2014), section 3.4.
    """
    where = "quantize.residual"
    check_int(where, "stages", stages, 1)
    check_int(where, "beam", beam, 1)

    def quantize(
        weight: Tensor, count: int, moments: Tensor | None, seed: int, advance: Callable[[int], object]
    ) -> VectorCodes:
        return residual_quantize(weight, stages, count, beam=beam, moments=moments, seed=seed, advance=advance)

    return _apply(where, model, entries, quantize, lambda _: stages, data, targets, ignore, seed, progress)


def _apply(
    where: str,
    model: nn.Module,
    entries: int,
    quantize: Quantize,
    steps: Callable[[Target], int],
    data: Iterable[Any] | None,
    targets: Patterns | None,
    ignore: Patterns | None,
    seed: int,
    progress: bool,
) -> nn.Module:
    check_int(where, "entries", entries, 1, MAX_ENTRIES)
    check_int(where, "seed", seed, 0)
    check_flag(where, "progress", progress)
    chosen = select(where, model, targets, ignore)
    for target in chosen:
        if not target.weight.numel():
            raise ValueError(
                f"{where}: the weight of {target.name!r} must hold numbers, got shape {tuple(target.weight.shape)}; "
                f"pass ignore=[{target.name!r}]"
            )
    total = sum(steps(target) for target in chosen)
    if data is not None:
        check_data(where, data, len(chosen))
        check_layers(where, chosen)
    found = []
    with Progress(disable=not progress) as bar:
        task = bar.add_task("sharing sub-vectors", total=total)
        for index, target in enumerate(chosen):
            weight = target.weight.flatten(1)
            moments = None if data is None else _moments(where, model, target, data)
            count = min(entries, weight.shape[0])
            codes, codebooks = quantize(weight, count, moments, seed + index, lambda done: bar.advance(task, done))
            found.append((codes, codebooks.to(torch.promote_types(weight.dtype, torch.float32))))
    for target, (codes, codebooks) in zip(chosen, found, strict=True):
        attach(target.owners).mask.fill_(True)
        share(target.owners, codes, codebooks)
    return model


def _moments(where: str, model: nn.Module, target: Target, data: Iterable[Any]) -> Tensor:
    hessian = input_moments(where, model, target, data).hessian
    if len(hessian) > 1:
        raise ValueError(
            f"{where}: the weight of {target.name!r} must be of a layer without groups where data is given, got "
            f"{len(hessian)} groups; pass ignore=[{target.name!r}]"
        )
    return hessian[0]
