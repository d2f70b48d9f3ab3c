"""tersetorch report: the page put together."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from tersetorch.recipes.compression_record import CompressionRecord
from tersetorch.reports.page import charts
from tersetorch.reports.page.measurements import Measurements
from tersetorch.reports.page.rows import Row, rows
from tersetorch.reports.page.words import joules, nbytes, ratio, short, time
from tersetorch.storage.inspection import Inspection

MOST_TOLD = 24  # models on the way that a sentence can name
# No page has them; a record may.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Headline:
    """One of the figures at the top.

    Attributes:
        title: what it is of.
        after: as it is now.
        before: as it was; empty where it was not measured.
        change: in words.
        note: where it comes from, or how to get it.
    """

    title: str
    after: str
    before: str
    change: str
    note: str


@dataclass(frozen=True)
class Picture:
    """A chart, or why there is none.

    Attributes:
        title: the heading.
        svg: the picture; empty where there is none.
        words: what it shows, for who cannot see it, or how to get it.
    """

    title: str
    svg: str
    words: str


def build_page(
    inspection: Inspection, *, measured: Measurements | None = None, record: CompressionRecord | None = None
) -> str:
    """One self-contained page of HTML: scripts, styles and pictures are in it, and it asks no network for anything.

    Args:
        inspection: what tersetorch.inspect gave of the file.
        measured: of the file's model on this machine; without it the page has no times, energy and roofline, and says
            how to get them.
        record: what tersetorch compress left beside the file; without it the page has no accuracy and sensitivity.

    Returns:
        The page. The same figures give the same page.

    Raises:
        ModuleNotFoundError: jinja2 or matplotlib is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ModuleNotFoundError(
            "report: the page must be filled in by jinja2, got no such package; run pip install 'tersetorch[report]'"
        ) from error
    table = rows(inspection, measured)
    # Names of layers come from the file, whoever made it: they are text, never markup.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("tersetorch.reports.page") / "page.html.jinja").read_text("utf-8"))
    page = template.render(
        name=Path(inspection.path).name,
        inspection=inspection,
        headlines=[_size(inspection, record), _accuracy(record), _latency(measured), _energy(measured)],
        rows=table,
        parts=[(part, count, 100 * count / inspection.file_bytes) for part, count in inspection.parts.items() if count],
        pictures=[
            _sizes(inspection, table),
            _sensitivity(record),
            _error_by_size(record),
            _roofline(measured, table),
        ],
        measured=measured,
        record=record,
        machine={} if measured is None else measured.conversion.machine or {},
    )
    return _CONTROLS.sub("", page)


def _size(inspection: Inspection, record: CompressionRecord | None) -> Headline:
    note = "Every byte of the file."
    if record is not None:  # as compress says it
        before = record.before.file_bytes
        note += (
            f" And {ratio(before, inspection.file_bytes)} smaller than the {nbytes(before)} that the model took in a "
            ".terse file as it came."
        )
    return Headline(
        "File",
        nbytes(inspection.file_bytes),
        f"{nbytes(inspection.dense_bytes)} as float32",
        f"{ratio(inspection.dense_bytes, inspection.file_bytes)} smaller than float32",
        note,
    )


def _accuracy(record: CompressionRecord | None) -> Headline:
    if record is None:
        return Headline("Error", "not recorded", "", "", "'tersetorch compress' leaves a record beside its file.")
    before, after = record.before.error_percent, record.after.error_percent
    return Headline(
        "Error",
        f"{after:.2f} %",
        f"{before:.2f} %",
        f"{after - before:+.2f} points",
        f"Of {record.examples:,} examples of {record.data} that were held out.",
    )


def _latency(measured: Measurements | None) -> Headline:
    if measured is None:
        return Headline("Time", "not measured", "", "", "Give --input-shape or --input to measure it on this machine.")
    before, after = measured.conversion.dense_ms, measured.conversion.converted_ms
    note = f"A call with inputs of {measured.inputs}, median, on this machine."
    if before is None or after is None:  # no layer won, so there was no other model to time
        return Headline("Time", "as before", "", "every layer stays dense", f"{note} {measured.conversion.reason}")
    return Headline("Time", time(after), time(before), f"{ratio(before, after)} faster than dense", note)


def _energy(measured: Measurements | None) -> Headline:
    if measured is None:
        return Headline("Energy", "not counted", "", "", "Give --input-shape or --input to count it.")
    before, after = measured.energy_before.total, measured.energy_after.total
    fits = measured.energy_after.weight_bytes <= measured.energy_after.cache_bytes < measured.energy_before.weight_bytes
    cache = "Weights fit the cache on the chip now, which is most of it." if fits else ""
    return Headline(
        "Energy",
        joules(after),
        joules(before),
        "as before" if ratio(before, after) == "1x" else f"{ratio(before, after)} less than dense",
        f"Of one call by the table of 45 nm, a bound and no measurement. {cache}",
    )


def _sizes(inspection: Inspection, table: list[Row]) -> Picture:
    largest = sorted(table, key=lambda row: -row.nbytes)
    shown, rest = largest[: charts.MOST_LAYERS], largest[charts.MOST_LAYERS :]
    others = f"{len(rest):,} smaller layers, {nbytes(sum(row.nbytes for row in rest))}; " if rest else ""
    own = nbytes(inspection.header_bytes + inspection.container_bytes)
    words = (
        f"Bytes of {_of('take most', len(shown), len(table))} in the file, stacked by what they are: the same figures "
        f"are in the tables. Not drawn: {others}header and container, {own}."
    )
    return Picture("What the file is made of", charts.sizes(inspection, shown), words)


def _sensitivity(record: CompressionRecord | None) -> Picture:
    title = "What each layer can lose"
    if record is None or record.sensitivity is None:
        return Picture(title, "", "No record of a sensitivity scan: run 'tersetorch compress' with --max-drop.")
    layers = record.sensitivity.layers
    worst = {name: max((error for _, error in points), default=0.0) for name, points in layers.items()}
    shown = sorted(layers, key=lambda name: -worst[name])[: charts.MOST_LAYERS]
    drawn = _of("lose most", len(shown), len(layers))
    words = (
        f"Error with one layer pruned at a time, by magnitude, of {drawn}; the dashed line is the model as it came, "
        f"{record.before.error_percent:.2f} %."
    )
    return Picture(title, charts.sensitivity(record.sensitivity, shown), words)


def _error_by_size(record: CompressionRecord | None) -> Picture:
    title = "Error against size"
    if record is None:
        return Picture(title, "", "No record beside the file: 'tersetorch compress' writes one.")
    shown = charts.spread(record.points, charts.MOST_POINTS)
    told = shown if len(shown) <= MOST_TOLD else []
    points = "; ".join(
        f"{short(point.label)}: {nbytes(point.file_bytes)}, {point.error_percent:.2f} %"
        for point in (record.before, *told, record.after)
    )
    between = ""
    if not told and record.points:
        drawn = f", of which {len(shown):,} are drawn" if len(shown) < len(record.points) else ""
        between = f" Between the two lie {len(record.points):,} more{drawn}."
    how = f", {record.how_pruned}" if record.how_pruned else ""
    words = f"Models on the way{how}. {points}.{between}"
    return Picture(title, charts.error_by_size(record.before, shown, record.after), words)


def _roofline(measured: Measurements | None, table: list[Row]) -> Picture:
    title = "How near each layer is to what the machine can do"
    if measured is None:
        return Picture(title, "", "Not measured: give --input-shape or --input.")
    found = charts.reached(measured, table)
    shown = dict(list(found.items())[: charts.MOST_LAYERS])
    words = (
        f"Operations a second over operations a byte moved, of {_of('take longest', len(shown), len(found))}. Lines "
        "are the rates that this machine reached just now: reading and arithmetic. Small layers lie far below them, "
        "since a call costs time too."
    )
    return Picture(title, charts.roofline(measured.rates, shown), words)


def _of(which: str, shown: int, layers: int) -> str:
    return "each layer" if shown == layers else f"the {shown} of {layers:,} layers that {which}"
