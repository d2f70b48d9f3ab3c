"""What each layer costs at each sparsity: bytes of the file, operations, or measured time."""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.progress import Progress
from torch import nn

from tersetorch.conversion.convert import convert
from tersetorch.conversion.report import report
from tersetorch.costs import count
from tersetorch.methods import finalize, prune
from tersetorch.methods.parametrization import release_graphs
from tersetorch.methods.selection import Target
from tersetorch.storage import inspect, save

Unit = Literal["bytes", "operations", "milliseconds"]


@dataclass(frozen=True)
class CostCurves:
    """The cost of a model by the sparsity of its layers.

    Attributes:
        fixed: what does not depend on the sparsities.
        layers: for each layer, its cost at each sparsity.
    """

    fixed: float
    layers: dict[str, dict[float, float]]

    def total(self, sparsities: dict[str, float]) -> float:
        """The cost of the model with these sparsities."""
        return self.fixed + sum(self.layers[name][sparsity] for name, sparsity in sparsities.items())


def cost_curves(
    model: nn.Module,
    targets: Sequence[Target],
    sparsities: Sequence[float],
    unit: Unit,
    example_inputs: Any = None,
    pattern: str | None = None,
    progress: Progress | None = None,
) -> CostCurves:
    """The cost of model with its targets pruned by magnitude, all to one sparsity after another.

    - "bytes": of the file that tersetorch.save writes, layer by layer as tersetorch.inspect itemises it.
    - "operations": multiply-accumulates of the weights that are left, as tersetorch.costs.count counts them.
    - "milliseconds": of each layer in the form that tersetorch.convert chooses for it on this machine; what the dense
      model takes beside its layers is fixed. A curve never rises with the sparsity: what would is noise, and is cut
      off. A layer that is not worth timing at any of the sparsities costs 0.

    Args:
        model: it is not changed, copies are pruned.
        targets: what methods.selection.select gave for model.
        sparsities: parts of a layer's weights, ascending.
        unit: one of the three.
        example_inputs: as in tersetorch.convert; not needed for bytes.
        pattern: blocks "RxC" as in prune.magnitude, or None.
        progress: a bar is added to it.
    """
    task = None if progress is None else progress.add_task(f"{unit} at each sparsity", total=len(sparsities))
    measured = []
    release_graphs(model)
    for sparsity in sparsities:
        pruned = copy.deepcopy(model)
        prune.magnitude(pruned, sparsity, pattern=pattern, targets=[target.name for target in targets])
        finalize(pruned)
        measured.append(_MEASURES[unit](pruned, example_inputs))
        if progress is not None and task is not None:
            progress.advance(task)
    owned = {target.name: [name for name in target.names if name in measured[0].layers] for target in targets}
    # Each layer that uses a tied weight computes with it; the file holds it once, and a time is that of all of them.
    names = {name: own if unit == "operations" else own[:1] for name, own in owned.items()}
    layers = {
        name: {s: sum(found.layers[each] for each in own) for s, found in zip(sparsities, measured, strict=True)}
        for name, own in names.items()
    }
    if unit == "milliseconds":
        return _quiet(layers, names, measured)
    return CostCurves(
        measured[0].whole - sum(measured[0].layers[each] for own in names.values() for each in own), layers
    )


@dataclass(frozen=True)
class Measured:
    """The cost of every layer at one setting, in its dense form too, and of the whole model; NaN: not measured."""

    layers: Mapping[str, float]
    whole: float
    dense: Mapping[str, float] = field(default_factory=dict)
    whole_dense: float = math.nan


def file_bytes(model: nn.Module, example_inputs: Any = None) -> Measured:
    """What the file that tersetorch.save writes holds of each layer, and all of it.

    Raises:
        OSError: the system's folder for temporary files has no room for it.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.terse"
            save(model, path)
            inspection = inspect(path)
    except OSError as error:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        raise OSError(
            "tersetorch: the folder for temporary files, where the size of a model's file is measured, must have room "
            f"for it, got {tempfile.tempdir} ({cause.strerror or cause}); make room there, "
            "allow larger files, or name another in the environment variable TMPDIR"
        ) from error
    return Measured({tensor.name: tensor.nbytes for tensor in inspection.tensors}, inspection.file_bytes)


def _operations(pruned: nn.Module, example_inputs: Any) -> Measured:
    counted = count(pruned, example_inputs)
    return Measured({layer.name: layer.effective_macs for layer in counted.layers}, counted.effective_macs)


def _milliseconds(pruned: nn.Module, example_inputs: Any) -> Measured:
    told = report(convert(pruned, example_inputs))
    layers, dense = {}, {}
    for layer in told.layers:
        tried = {trial.format: trial.median_ms for trial in layer.trials}
        layers[layer.name] = tried.get(layer.chosen) or math.nan
        dense[layer.name] = layer.dense_ms or math.nan
    return Measured(layers, told.converted_ms or math.nan, dense, told.dense_ms or math.nan)


def _quiet(
    layers: dict[str, dict[float, float]], names: Mapping[str, list[str]], measured: Sequence[Measured]
) -> CostCurves:
    """Times without what is only noise: where a layer stays dense, its one dense time; none above a sparser one's."""
    dense = {}
    for name, own in names.items():
        seen = [found.dense[own[0]] for found in measured if not math.isnan(found.dense[own[0]])]
        dense[name] = statistics.median(seen) if seen else 0.0  # never worth timing: nothing is faster at any sparsity
    for name, curve in layers.items():
        least = dense[name]
        for sparsity in curve:
            least = curve[sparsity] = least if math.isnan(curve[sparsity]) else min(least, curve[sparsity])
    rest = [found.whole_dense - sum(dense.values()) for found in measured if not math.isnan(found.whole_dense)]
    return CostCurves(max(0.0, statistics.median(rest)) if rest else 0.0, layers)


_MEASURES: dict[Unit, Callable[[nn.Module, Any], Measured]] = {
    "bytes": file_bytes,
    "operations": _operations,
    "milliseconds": _milliseconds,
}
