"""The page's pictures, as SVG whose words stay words: read aloud, searched, and sharp at any size."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from tersetorch.recipes.compression_record import Point, SensitivityCurves
from tersetorch.reports.figure import figure_class
from tersetorch.reports.page.measurements import Measurements, Rates, moved_bytes, operations
from tersetorch.reports.page.rows import Row
from tersetorch.reports.page.words import nbytes, short
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
Item = TypeVar("Item")
MARKERS = "osv^D*PX"
MOST_COLUMNS = 4  # of a legend, where the names are short enough
MOST_LAYERS = 24  # bars or curves that a phone can still show
MOST_POINTS = 200  # of a curve or a cloud
MOST_TICKS = 5
LEAST_SPAN = 6  # of a logarithmic axis: it holds two of 1, 2, 5, 10, wherever it begins
SPOT = 10  # pixels that a marker takes
# Points across and up from a marker to its name, and which side and edge of the name lies there; the best first.
PLACES = (
    (6, -3, "left", "top"),
    (6, 3, "left", "bottom"),
    (-6, -3, "right", "top"),
    (-6, 3, "right", "bottom"),
    (0, 8, "center", "bottom"),
    (0, -8, "center", "top"),
)


def sizes(inspection: Inspection, layers: Sequence[Row]) -> str:
    """The layers' bytes, stacked by what they are made of."""
    by_layer: dict[str, dict[str, int]] = {}
    for tensor in inspection.tensors:
        parts = by_layer.setdefault(tensor.name.rpartition(".")[0] or "(model)", {})
        for part, count in tensor.parts.items():
            parts[part] = parts.get(part, 0) + count
    bars = [by_layer[row.name] for row in layers]

    def draw(axes: Any) -> None:
        left = [0] * len(bars)
        for part in PARTS:
            widths = [parts.get(part, 0) for parts in bars]
            if any(widths):
                axes.barh(range(len(bars)), widths, left=left, color=COLOURS[part], label=part)
                left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(bars)), [short(row.name) for row in layers], fontsize="small")
        axes.set(xlabel="in the file", xlim=(0, 1.03 * max([*left, 1])))
        axes.locator_params(axis="x", nbins=MOST_TICKS, integer=True)
        axes.xaxis.set_major_formatter(lambda value, _: nbytes(round(value)))
        axes.margins(y=0.01)
        axes.invert_yaxis()
        _legend_below(axes)

    return _svg("sizes", draw, height=1.1 + 0.26 * len(bars))


def sensitivity(curves: SensitivityCurves, layers: Sequence[str]) -> str:
    """The error over what is kept of a layer, a curve a layer."""

    def draw(axes: Any) -> None:
        for index, name in enumerate(layers):
            line = spread(sorted([(0.0, curves.baseline), *curves.layers[name]]), MOST_POINTS)
            kept, errors = [100 * (1 - part) for part, _ in line], [error for _, error in line]
            axes.plot(kept, errors, marker=MARKERS[index % len(MARKERS)], markersize=4, label=short(name))
        axes.axhline(curves.baseline, color="0.4", linewidth=1, linestyle="--")
        axes.set(xlabel="weights of the layer kept, %", ylabel="error, %", xlim=(100, 0))
        _legend_below(axes)

    return _svg("sensitivity", draw)


def error_by_size(before: Point, between: Sequence[Point], after: Point) -> str:
    """The error of the models on the way over the bytes of their files."""
    points = [*((point, "o", "#767676") for point in between), (before, "s", "#0072b2"), (after, "*", "#d55e00")]

    def draw(axes: Any) -> None:
        places = [(float(max(point.file_bytes, 1)), point.error_percent) for point, *_ in points]
        for (size, error), (_, marker, colour) in zip(places, points, strict=True):
            axes.plot(size, error, marker, color=colour, markersize=13 if marker == "*" else 7)
        _log_axis(axes.xaxis, [size for size, _ in places], 1.8, lambda size: nbytes(round(size)))
        axes.set(xlabel="file (log scale)", ylabel="error, %")
        axes.margins(y=0.2)
        _name_points(axes, places, [short(point.label) for point, *_ in points])

    return _svg("error_by_size", draw)


def reached(measured: Measurements, table: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Operations a byte and giga-operations a second of each layer that was timed, the longest first."""
    times = {row.name: row.runs_us for row in table if row.runs_us}
    found = []
    for layer in measured.energy_after.layers:
        name, moved = layer.name or "(model)", moved_bytes(layer)
        taken = times.get(name)
        if taken and moved and operations(layer):
            found.append((taken, name, (operations(layer) / moved, operations(layer) / taken / 1000)))
    return {name: point for _, name, point in sorted(found, key=lambda each: -each[0])}


def roofline(rates: Rates, layers: Mapping[str, tuple[float, float]]) -> str:
    """What each layer reaches under what the machine can do: operations a second over operations a byte.

    Source:
        Williams, Waterman, Patterson, Roofline (2009).
    """

    def draw(axes: Any) -> None:
        reach, speeds = [[point[i] for point in layers.values()] for i in (0, 1)]
        peak = max(rates.arithmetic.values())
        knees = [peak / rate for rate in rates.reads.values()]
        left, right = _log_axis(axes.xaxis, [*reach, *knees], 4, "{:,.10g}".format)
        slopes = [rate * left for rate in rates.reads.values()]
        _log_axis(axes.yaxis, [*slopes, *speeds, peak], 2, "{:,.10g}".format)
        axes.set(xlabel="operations a byte (log scale)", ylabel="giga-operations a second (log scale)")
        for index, (name, (intensity, speed)) in enumerate(layers.items()):
            axes.plot(intensity, speed, MARKERS[index % len(MARKERS)], markersize=7, label=short(name))
        places, names = list(layers.values()), [""] * len(layers)  # the legend names these
        for (name, rate), style in zip(rates.reads.items(), ("-", "--", ":", "-.") * 4, strict=False):
            knee = max(rates.arithmetic["float32"] / rate, left)
            axes.plot([left, knee], [left * rate, knee * rate], style, color="#444444", linewidth=1)
            places.append((left, left * rate))
            names.append(f"{name}, {rate:.0f} GB/s")
        for (name, rate), style in zip(rates.arithmetic.items(), ("-", "--", ":") * 4, strict=False):
            axes.plot([left, right], [rate, rate], style, color="#444444", linewidth=1)
            places.append((right, rate))
            names.append(f"{name}, {rate:.0f} Gop/s")
        if layers:
            _legend_below(axes)
        _name_points(axes, places, names)

    return _svg("roofline", draw, height=4.2)


def spread(items: Sequence[Item], most: int) -> Sequence[Item]:
    """All items or, of more than most, the first, the last and others as far from each other as can be."""
    if len(items) <= most:
        return items
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def _log_axis(axis: Any, numbers: Sequence[float], room: float, words: Callable[[float], str]) -> tuple[float, float]:
    """Makes an axis logarithmic around numbers, in words at a few round ones; gives where it begins and ends."""
    low, high = min(numbers) / room, max(numbers) * room
    widen = max(1.0, math.sqrt(LEAST_SPAN * low / high))
    low, high = low / widen, high * widen
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    ticks: list[float] = []
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [step * power for power in powers for step in steps if low <= step * power <= high]
        if len(ticks) <= MOST_TICKS:
            break
    ticks = ticks[:: math.ceil(len(ticks) / MOST_TICKS)]
    # matplotlib's own words are formulas, which are not parsed here.
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low, high)})
    axis.set_ticks([], minor=True)
    axis.set_ticks(ticks, [words(tick) for tick in ticks])
    return low, high


def _name_points(axes: Any, places: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """Writes names beside their places, never over one another: once where places meet, none where there is no room."""
    from matplotlib.transforms import Bbox

    figure = axes.figure
    figure.draw_without_rendering()  # now it is known where all lies
    frame = axes.bbox
    together: list[tuple[float, float, list[int]]] = []
    for index, (x, y) in enumerate(axes.transData.transform(places)):
        near = (members for left, low, members in together if math.hypot(left - x, low - y) < SPOT / 2)
        members = next(near, None)
        if members is None:
            together.append((x, y, [index]))
        else:
            members.append(index)
    taken = [Bbox.from_bounds(x - SPOT / 2, y - SPOT / 2, SPOT, SPOT) for x, y, _ in together]
    # The last ones, before and after or the machine's, matter most.
    for _, _, members in reversed(together):
        name = ", ".join(dict.fromkeys(names[index] for index in members if names[index]))
        for across, up, side, edge in PLACES if name else ():
            words = axes.annotate(
                name, places[members[0]], (across, up), textcoords="offset points", fontsize="small", ha=side, va=edge
            )
            words.set_in_layout(False)  # or it would move what was just measured
            box = words.get_window_extent()
            inside = frame.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not box.count_overlaps(taken):
                taken.append(box)
                break
            words.remove()


def _legend_below(axes: Any) -> None:
    """Names under the picture, which grows by them: in it, those of many layers would hide what they name."""
    figure = axes.figure
    for columns in range(MOST_COLUMNS, 0, -1):
        legend = figure.legend(
            fontsize="small", loc="outside lower center", ncols=columns, columnspacing=1, handlelength=1.5
        )
        box = legend.get_window_extent()
        if box.width <= figure.bbox.width or columns == 1:
            figure.set_figheight(figure.get_figheight() + box.height / figure.dpi)
            return
        legend.remove()


def _svg(name: str, draw: Callable[[Any], None], height: float = 3.6) -> str:
    """The picture's <svg> element, without a size of its own: the page decides."""
    figure_type = figure_class("report")
    from matplotlib import rc_context  # beside Figure, so it is there

    # Ids of a picture depend on its own salt alone: pages are the same for the same figures, and no two pictures mix.
    # A name between dollar signs is a name, not a formula.
    plain = rc_context({"text.parse_math": False})
    with (
        plain,
        warnings.catch_warnings(),
        rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 11}),
    ):
        # The text stays text in an SVG, drawn in a font of who reads it; only its width here is a guess.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure = figure_type(figsize=(5.2, height), layout="constrained")
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
