"""Pruning and sharing by second derivatives as a recipe asks for it: on the same examples from layer to layer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tersetorch.methods import prune, quantize
from tersetorch.methods.prune.calibration import check_data, reached
from tersetorch.methods.selection import DEFAULT_TARGETS, find_weights
from tersetorch.recipes.run_folder import fingerprint_of
from tersetorch.zoo.ranks import alike

if TYPE_CHECKING:
    from rich.progress import Progress

    from tersetorch.methods.selection import PerPattern
    from tersetorch.recipes.deep_compression import PruneStage


def first_batches(where: str, data: Iterable[Any] | None, examples: int) -> list[Any]:
    """The first batches that together hold so many examples; all of data where it holds fewer.

    Args:
        where: the public function, for errors.
        data: batches as prune.obs takes them; an iterator serves too, since what is taken is kept.
        examples: at least 1; the length of a batch's first tensor is how many it holds.

    Raises:
        TypeError: data is no iterable of batches.
        ValueError: it is None, or holds nothing.
    """
    if data is None:
        raise ValueError(
            f"{where}: calibration must be given where recipe.prune.method is 'obs', got None; pass batches of the "
            "model's inputs, as prune.obs takes them"
        )
    check_data(where, data, 1, "calibration")
    found: list[Any] = []
    held = 0
    for batch in data:
        found.append(batch)
        first = next((tensor for tensor in _tensors(batch) if tensor.dim()), None)
        held += 1 if first is None else len(first)
        if held >= examples:
            break
    if not held:
        raise ValueError(f"{where}: calibration must hold at least one example, got none; pass inputs of the model")
    return found


def drawn_batches(images: Tensor, examples: int, batch_size: int, seed: int) -> list[Tensor]:
    """The first images that tersetorch.zoo.fit would train on with this seed, in batches."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return list(images[order[:examples]].split(batch_size))


def fingerprint_of_batches(batches: Sequence[Any]) -> str:
    """What tells the tensors of some batches from those of others."""
    tensors = [tensor for batch in batches for tensor in _tensors(batch)]
    return fingerprint_of((str(place), tensor) for place, tensor in enumerate(tensors))


def check_calibrated(where: str, model: nn.Module, pruned: Iterable[str], batches: Sequence[Any]) -> None:
    """Refuses layers to prune that prune.obs cannot calibrate, before it has worked on the others.

    Raises:
        ValueError: a layer is none of Linear and Conv, or the first batch does not reach it.
    """
    pruned = list(pruned)
    found = calibrated_layers(model, pruned, batches)
    other = next((name for name in pruned if name not in found), None)
    if other is not None:
        raise ValueError(
            f"{where}: recipe.prune.sparsity must name Linear and Conv layers that inputs reach where method is 'obs', "
            f"got {other!r}, which is none, or whose parent reads its weight itself; name the others, one by one or by "
            "patterns"
        )


def prune_calibrated(
    model: nn.Module,
    sparsity: float | PerPattern[float],
    stage: PruneStage,
    batches: Sequence[Any],
    progress: Progress | None = None,
) -> nn.Module:
    """Prunes model in place as a stage of method "obs" says; the same bits on every rank. Raises as prune.obs does."""
    assert stage.solver is not None and stage.refine is not None
    refine = stage.refine if stage.solver == "blocked" else 0
    prune.obs(model, batches, sparsity, solver=stage.solver, refine=refine, progress=progress)
    alike(model)
    return model


def share_calibrated(
    model: nn.Module,
    bits: Mapping[str, int],
    stage: PruneStage,
    batches: Sequence[Any],
    progress: Progress | None = None,
) -> nn.Module:
    """Shares the weights of layers in place, each rounded so that those still to come make up for it.

    That is prune.obs with bits, which prunes nothing more here. Layers that it cannot calibrate, embeddings and those
    that the batches do not reach, are clustered by quantize.kmeans.

    Args:
        model: pruned or not; the errors that count are those of the outputs that it has now.
        bits: for each layer.
        stage: says how often values are refined.
        batches: as in prune.obs.
        progress: a bar is added to it.

    Raises:
        ValueError: as prune.obs and quantize.kmeans.
    """
    assert stage.refine is not None
    rounded = {name: bits[name] for name in calibrated_layers(model, bits, batches)}
    clustered = {name: width for name, width in bits.items() if name not in rounded}
    if rounded:
        targets = list(rounded)
        prune.obs(model, batches, 0.0, bits=rounded, refine=stage.refine, targets=targets, progress=progress)
    if clustered:
        quantize.kmeans(model, clustered)
    alike(model)
    return model


def calibrated_layers(model: nn.Module, names: Collection[str], batches: Sequence[Any]) -> list[str]:
    """Those of the layers that prune.obs can calibrate: Linear and Conv ones that the first batch reaches."""
    named = [target for target in find_weights(model) if target.name in names]
    layers = [target for target in named if all(isinstance(module, DEFAULT_TARGETS) for module, _ in target.owners)]
    return [layers[place].name for place in sorted(reached(model, layers, batches))]


def _tensors(batch: Any) -> list[Tensor]:
    plain = dict(batch) if isinstance(batch, Mapping) else batch
    return [leaf for leaf in pytree.tree_leaves(plain) if isinstance(leaf, Tensor)]
