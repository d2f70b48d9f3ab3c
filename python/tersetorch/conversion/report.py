"""What convert tried on each layer, what it chose and why."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from tersetorch.conversion.walk import label

# Where the converted model carries its report, as plain data: not in its state_dict, kept by deepcopy and pickle.
ATTRIBUTE = "_tersetorch_conversion"
WIDTH = 160
# How the reason of a candidate begins that was not even built.
NOT_TRIED = "not tried"


@dataclass(frozen=True)
class Trial:
    """One candidate on one layer; figures are None where it did not come to that.

    Attributes:
        format: the candidate's name.
        reason: what came of it, in words.
        median_ms: median time of the layer's calls.
        ratio: median over the rounds of its time over the strongest dense form's.
        wins: rounds it won.
        rounds: rounds it ran in.
        max_difference: largest |output difference| to the dense layer on the captured inputs.
    """

    format: str
    reason: str
    median_ms: float | None = None
    ratio: float | None = None
    wins: int | None = None
    rounds: int | None = None
    max_difference: float | None = None


@dataclass(frozen=True)
class LayerReport:
    """One layer; layers that use one weight are measured together and show the same figures.

    Attributes:
        name: its path, "" for the model itself.
        names: every path of a shared module.
        kind: its class.
        shape: of its weight; empty where it has none.
        density: share of non-zeros, or None where it was not counted.
        distinct: distinct non-zero values, or None where there are more than 255 or they were not counted.
        chosen: "dense" or a format's name.
        reason: why, in words.
        dense_form: the strongest dense form, or None where nothing was measured.
        dense_ms: its median time.
        noise: how much dense differs from itself.
        cached: the figures are those of an earlier measurement.
        trials: the candidates.
        relu: the nn.ReLU that it computes too, or None.
    """

    name: str
    names: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    density: float | None
    distinct: int | None
    chosen: str
    reason: str
    dense_form: str | None = None
    dense_ms: float | None = None
    noise: float | None = None
    cached: bool = False
    trials: tuple[Trial, ...] = ()
    relu: str | None = None


@dataclass(frozen=True)
class ConversionReport:
    """The whole conversion.

    Attributes:
        layers: every layer that owns a weight matrix.
        reason: what was decided about the model as a whole, in words.
        dense_ms: median time of the dense model; None where nothing was measured.
        converted_ms: median time of the converted model.
        ratio: median over the rounds of the second over the first.
        wins: rounds the converted model won, of 15.
        max_difference: largest |output difference| between them on example_inputs.
        memory_format: "channels_last" where the weights of the dense convolutions were put into it, or None.
        in_place: the nn.ReLUs that overwrite their inputs.
        machine: the facts of the machine, as in tersetorch.conversion.machine, and its load; None where nothing was
            measured.
    """

    layers: tuple[LayerReport, ...]
    reason: str
    dense_ms: float | None = None
    converted_ms: float | None = None
    ratio: float | None = None
    wins: int | None = None
    max_difference: float | None = None
    memory_format: str | None = None
    in_place: tuple[str, ...] = ()
    machine: dict[str, Any] | None = None

    @property
    def plan(self) -> dict[str, str]:
        """A valid plan= that makes the same choices without measuring."""
        return {layer.name: layer.chosen for layer in self.layers}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for json.dumps; from_dict reads it."""
        fields: dict[str, Any] = _plain(asdict(self))
        return fields | {"plan": self.plan}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ConversionReport:
        """The report that to_dict wrote."""
        fields = {key: value for key, value in data.items() if key not in ("plan", "layers", "in_place")}
        layers = tuple(_layer_from(layer) for layer in data["layers"])
        return cls(layers=layers, in_place=tuple(data["in_place"]), **fields)

    def __str__(self) -> str:
        table = Table()
        for heading in ("layer", "weight", "density", "distinct", "dense ms", "tried", "chosen", "why"):
            table.add_column(heading, overflow="fold")
        for layer in self.layers:
            table.add_row(
                ", ".join(map(label, layer.names)),
                f"{layer.kind} {'x'.join(map(str, layer.shape))}",
                _number(layer.density, ".3g"),
                _number(layer.distinct, "d"),
                _number(layer.dense_ms, ".4g"),
                "\n".join(_trial_lines(layer.trials)),
                layer.chosen + " + ReLU" * (layer.relu is not None),
                layer.reason,
            )
        console = Console(file=io.StringIO(), width=WIDTH, no_color=True)
        console.print(table, markup=False)
        console.print(self.reason, markup=False, highlight=False)
        if self.in_place:
            console.print(f"ReLU in place: {', '.join(self.in_place)}", markup=False, highlight=False)
        if self.max_difference is not None:
            console.print(f"Largest output difference: {self.max_difference:.3g}", highlight=False)
        if self.machine is not None:
            facts = "{cpu}, {isa}, {threads} threads, load {load:.1f}, torch {torch}".format_map(self.machine)
            console.print(f"Measured on {facts}", markup=False, highlight=False)
        assert isinstance(console.file, io.StringIO)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def report(model: nn.Module) -> ConversionReport:
    """What convert tried, chose and measured for model, and why.

    Raises:
        TypeError: model is not an nn.Module.
        ValueError: convert did not return model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: model must be an nn.Module, got {type(model).__name__}; pass what convert returned")
    data = vars(model).get(ATTRIBUTE)
    if data is None:
        raise ValueError(
            f"report: model must come from convert, got a {type(model).__name__} without a report; "
            "call tt.convert(model, example_inputs) and pass its result"
        )
    return ConversionReport.from_dict(data)


def attach(model: nn.Module, conversion: ConversionReport) -> None:
    """Leaves the report on model, for report(model)."""
    # Past nn.Module's own __setattr__, which a class may have changed.
    vars(model)[ATTRIBUTE] = conversion.to_dict()


def _layer_from(data: dict[str, Any]) -> LayerReport:
    trials = tuple(Trial(**trial) for trial in data["trials"])
    return LayerReport(
        **{**data, "names": tuple(data["names"]), "shape": tuple(data["shape"]), "trials": trials},
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _trial_lines(trials: tuple[Trial, ...]) -> list[str]:
    """Those that came to something; the others, most of a dozen, are counted. to_dict has why each was not tried."""
    tried = [trial for trial in trials if not trial.reason.startswith(NOT_TRIED)]
    others = len(trials) - len(tried)
    return [*map(_trial_line, tried), *([f"{NOT_TRIED}: {others} more"] if others else [])]


def _trial_line(trial: Trial) -> str:
    if trial.median_ms is None:
        return f"{trial.format}: {trial.reason.partition(':')[0]}"
    figures = f"{trial.median_ms:.4g} ms, x{trial.ratio:.2f}, won {trial.wins}/{trial.rounds}"
    return f"{trial.format}: {figures}, differs by {_number(trial.max_difference, '.2g')}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
