"""The page's pictures, as SVG whose words stay words: read aloud, searched, and sharp at any size."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from tersetorch.recipes.compression_record import CompressionRecord, SensitivityCurves
from tersetorch.reports.figure import figure_class
from tersetorch.reports.page.measurements import Measurements, moved_bytes, operations
from tersetorch.reports.page.rows import Row
from tersetorch.storage.errors import printable
from tersetorch.storage.inspection import PARTS, Inspection

# Okabe and Ito's colours, which the colour-blind tell apart, with greys for what is the file's own.
COLOURS = dict(
    zip(
        PARTS,
        (
            "#0072b2",
            "#56b4e9",
            "#009e73",
            "#e69f00",
            "#b8860b",
            "#d55e00",
            "#cc79a7",
            "#8c6bb1",
            "#994f00",
            "#666666",
            "#999999",
            "#bbbbbb",
            "#dddddd",
        ),
        strict=True,
    )
)
MARKERS = "osv^D*PX"
LEGEND_COLUMNS = 3
MOST_LAYERS = 24  # bars or curves that a phone can still show


def sizes(inspection: Inspection, table: Sequence[Row]) -> str:
    """The largest layers' bytes, stacked by what they are made of."""
    by_layer: dict[str, dict[str, int]] = {}
    for tensor in inspection.tensors:
        parts = by_layer.setdefault(tensor.name.rpartition(".")[0] or "(model)", {})
        for part, nbytes in tensor.parts.items():
            parts[part] = parts.get(part, 0) + nbytes
    names = [row.name for row in sorted(table, key=lambda row: -row.nbytes)]
    shown = [name for name in names if name in by_layer][:MOST_LAYERS]
    rest: dict[str, int] = {"header": inspection.header_bytes, "container": inspection.container_bytes}
    for name in names[len(shown) :]:
        for part, nbytes in by_layer[name].items():
            rest[part] = rest.get(part, 0) + nbytes
    bars = [*((name, by_layer[name]) for name in shown), ("all else", rest)]

    def draw(axes: Any) -> None:
        left = [0.0] * len(bars)
        for part in PARTS:
            widths = [parts.get(part, 0) / 1000 for _, parts in bars]
            if any(widths):
                axes.barh(range(len(bars)), widths, left=left, color=COLOURS[part], label=part)
                left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.set(yticks=range(len(bars)), yticklabels=[_short(name) for name, _ in bars], xlabel="kilobytes")
        axes.invert_yaxis()
        axes.figure.legend(fontsize="small", loc="outside lower center", ncols=4)

    return _svg("sizes", draw, height=2.0 + 0.26 * len(bars))


def sensitivity(curves: SensitivityCurves) -> str:
    """The error over what is kept of a layer, a curve a layer."""

    def draw(axes: Any) -> None:
        for index, (name, points) in enumerate(list(curves.layers.items())[:MOST_LAYERS]):
            line = sorted([(0.0, curves.baseline), *points])
            kept, errors = [100 * (1 - part) for part, _ in line], [error for _, error in line]
            axes.plot(kept, errors, marker=MARKERS[index % len(MARKERS)], markersize=4, label=_short(name))
        axes.axhline(curves.baseline, color="0.4", linewidth=1, linestyle="--")
        axes.set(xlabel="weights of the layer kept, %", ylabel="error, %", xlim=(100, 0))
        _legend_below(axes)

    return _svg("sensitivity", draw, height=3.6 + _legend_height(len(curves.layers)))


def error_by_size(record: CompressionRecord) -> str:
    """The error of the models on the way over the bytes of their files."""

    def draw(axes: Any) -> None:
        for point, marker, colour in (
            *((point, "o", "#767676") for point in record.points),
            (record.before, "s", "#0072b2"),
            (record.after, "*", "#d55e00"),
        ):
            size = 13 if marker == "*" else 7
            axes.plot(point.file_bytes / 1000, point.error_percent, marker, color=colour, markersize=size)
            place = {"textcoords": "offset points", "fontsize": "small"}
            axes.annotate(printable(point.label), (point.file_bytes / 1000, point.error_percent), (4, 5), **place)
        axes.set(xlabel="file, kilobytes (log scale)", ylabel="error, %", xscale="log")
        axes.margins(0.2)

    return _svg("error_by_size", draw)


def roofline(measured: Measurements, table: Sequence[Row]) -> str:
    """What each layer reaches under what the machine can do: operations a second over operations a byte.

    Source:
        Williams, Waterman, Patterson, Roofline (2009).
    """
    times = {row.name: row.runs_us for row in table}
    points = []
    for layer in measured.energy_after.layers:
        name, taken, moved = layer.name or "(model)", times.get(layer.name or "(model)"), moved_bytes(layer)
        if taken and moved and operations(layer):
            points.append((name, operations(layer) / moved, operations(layer) / taken / 1000))
    rates = measured.rates

    def draw(axes: Any) -> None:
        reach = [intensity for _, intensity, _ in points]
        peak = max(rates.arithmetic.values())
        knees = [peak / rate for rate in rates.reads.values()]
        left, right = min([*reach, *knees]) / 4, max([*reach, *knees]) * 4
        for (name, rate), style in zip(rates.reads.items(), ("-", "--", ":", "-.") * 4, strict=False):
            knee = max(rates.arithmetic["float32"] / rate, left)
            axes.plot([left, knee], [left * rate, knee * rate], style, color="#444444", linewidth=1)
            axes.annotate(
                f"{name}, {rate:.0f} GB/s", (left, left * rate), (3, 3), textcoords="offset points", fontsize=8
            )
        for (name, rate), style in zip(rates.arithmetic.items(), ("-", "--", ":") * 4, strict=False):
            axes.plot([left, right], [rate, rate], style, color="#444444", linewidth=1)
            axes.annotate(
                f"{name}, {rate:.0f} Gop/s", (right, rate), (-3, 3), textcoords="offset points", fontsize=8, ha="right"
            )
        for index, (name, intensity, rate) in enumerate(points[:MOST_LAYERS]):
            axes.plot(intensity, rate, MARKERS[index % len(MARKERS)], markersize=7, label=_short(name))
        axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="giga-operations a second")
        if points:
            _legend_below(axes)

    return _svg("roofline", draw, height=4.2 + _legend_height(len(points)))


def _legend_below(axes: Any) -> None:
    """Names under the picture: in it, those of many layers would hide what they name."""
    axes.figure.legend(fontsize="small", loc="outside lower center", ncols=LEGEND_COLUMNS)


def _legend_height(names: int) -> float:
    return 0.2 * math.ceil(min(names, MOST_LAYERS) / LEGEND_COLUMNS)


def _svg(name: str, draw: Callable[[Any], None], height: float = 3.6) -> str:
    """The picture's <svg> element, without a size of its own: the page decides."""
    figure_type = figure_class("report")
    from matplotlib import rc_context  # beside Figure, so it is there

    # Ids of a picture depend on its own salt alone: pages are the same for the same figures, and no two pictures mix.
    # A name between dollar signs is a name, not a formula.
    plain = rc_context({"text.parse_math": False})
    with (
        plain,
        rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 11}),
    ):
        figure = figure_type(figsize=(5.2, min(height, 9.0)), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # matplotlib numbers its groups alike in every picture, and shares markers by their looks.
    return re.sub(r'(id="|href="#|url\(#)', rf"\1{name}-", text)


def _short(name: str) -> str:
    name = printable(name)
    return name if len(name) <= 28 else f"{name[:12]}...{name[-13:]}"


def ratio(before: float, after: float) -> str:
    """Such as "12x smaller" without the word; "-" where there is nothing to divide by."""
    return f"{before / after:.3g}x" if after and math.isfinite(before / after) else "-"
