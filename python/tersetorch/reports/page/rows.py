"""The page's table: what the file, the measuring and the energy say of a layer, side by side."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tersetorch.conversion.report import LayerReport
from tersetorch.costs import ModelEnergy
from tersetorch.reports.page.measurements import Measurements
from tersetorch.storage.inspection import Inspection, StoredTensor


@dataclass(frozen=True)
class Row:
    """One layer; a figure that nobody measured is None.

    Attributes:
        name: its path; "(model)" for a model that is one layer.
        shape: of its weight, such as "300x784".
        kept: percent of the weight's numbers that are not zero.
        form: how its weight is stored.
        nbytes: of all its tensors in the file.
        percent: of what they take dense.
        runs_as: "dense" or a format's name.
        dense_us: time of the strongest dense form, in microseconds.
        runs_us: time of what it runs as.
        speedup: the first over the second.
        dense_nj: energy of the dense layer, in nanojoules.
        runs_nj: energy as it runs.
    """

    name: str
    shape: str
    kept: float | None
    form: str
    nbytes: int
    percent: float | None
    runs_as: str | None = None
    dense_us: float | None = None
    runs_us: float | None = None
    speedup: float | None = None
    dense_nj: float | None = None
    runs_nj: float | None = None


def rows(inspection: Inspection, measured: Measurements | None) -> list[Row]:
    """A row a layer, in the file's order: every tensor of the file belongs to one."""
    layers: dict[str, list[StoredTensor]] = {}
    for tensor in inspection.tensors:
        layers.setdefault(tensor.name.rpartition(".")[0], []).append(tensor)
    reports = {} if measured is None else {name: layer for layer in measured.conversion.layers for name in layer.names}
    before = {} if measured is None else _nanojoules(measured.energy_before)
    after = {} if measured is None else _nanojoules(measured.energy_after)
    found = []
    for name, tensors in layers.items():
        weight = max(tensors, key=lambda tensor: (tensor.dense_bytes, tensor.nbytes))
        nbytes, dense = sum(tensor.nbytes for tensor in tensors), sum(tensor.dense_bytes for tensor in tensors)
        report = reports.get(name)
        dense_us, runs_us = (None, None) if report is None else _times(report)
        found.append(
            Row(
                name=name or "(model)",
                shape="x".join(map(str, weight.shape)) or "one number",
                kept=_kept(weight, report),
                form=weight.form,
                nbytes=nbytes,
                percent=100 * nbytes / dense if dense else None,
                runs_as=None if report is None else report.chosen,
                dense_us=dense_us,
                runs_us=runs_us,
                speedup=dense_us / runs_us if dense_us and runs_us else None,
                dense_nj=before.get(name),
                runs_nj=after.get(name),
            )
        )
    return found


def _kept(weight: StoredTensor, report: LayerReport | None) -> float | None:
    """Percent that is not zero. Where nobody counted, a form without positions may hold zeros among its numbers."""
    if report is not None and report.density is not None:
        return 100 * report.density
    size = math.prod(weight.shape)
    return 100 * weight.stored / size if size and weight.form.startswith("sparse") else None


def _times(report: LayerReport) -> tuple[float | None, float | None]:
    """Microseconds of the strongest dense form, and of what was chosen."""
    if report.dense_ms is None:
        return None, None
    chosen = next((trial.median_ms for trial in report.trials if trial.format == report.chosen), None)
    runs = report.dense_ms if report.chosen == "dense" else chosen
    return 1000 * report.dense_ms, None if runs is None else 1000 * runs


def _nanojoules(energy: ModelEnergy) -> dict[str, float]:
    return {layer.name: layer.total / 1000 for layer in energy.layers}
