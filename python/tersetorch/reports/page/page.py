"""tersetorch report: the page put together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from tersetorch.recipes.compression_record import CompressionRecord
from tersetorch.reports.page import charts
from tersetorch.reports.page.measurements import Measurements
from tersetorch.reports.page.rows import Row, rows
from tersetorch.storage.inspection import Inspection

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
        headlines=[_size(inspection), _accuracy(record), _latency(measured), _energy(measured)],
        rows=table,
        parts=[(part, count, 100 * count / inspection.file_bytes) for part, count in inspection.parts.items() if count],
        pictures=[
            Picture(
                "What the file is made of",
                charts.sizes(inspection, table),
                "Bytes of each layer in the file, stacked by what they are: the same figures are in the tables.",
            ),
            _sensitivity(record),
            _error_by_size(record),
            _roofline(measured, table),
        ],
        measured=measured,
        record=record,
        machine={} if measured is None else measured.conversion.machine or {},
    )
    return _CONTROLS.sub("", page)


def _size(inspection: Inspection) -> Headline:
    return Headline(
        "File",
        nbytes(inspection.file_bytes),
        nbytes(inspection.dense_bytes),
        f"{charts.ratio(inspection.dense_bytes, inspection.file_bytes)} smaller",
        "Every byte of the file, against its weights as float32.",
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
    return Headline("Time", _time(after), _time(before), f"{charts.ratio(before, after)} faster", note)


def _energy(measured: Measurements | None) -> Headline:
    if measured is None:
        return Headline("Energy", "not counted", "", "", "Give --input-shape or --input to count it.")
    before, after = measured.energy_before.total, measured.energy_after.total
    fits = measured.energy_after.weight_bytes <= measured.energy_after.cache_bytes < measured.energy_before.weight_bytes
    cache = "Weights fit the cache on the chip now, which is most of it." if fits else ""
    return Headline(
        "Energy",
        _joules(after),
        _joules(before),
        "as before" if charts.ratio(before, after) == "1x" else f"{charts.ratio(before, after)} less",
        f"Of one call by the table of 45 nm, a bound and no measurement. {cache}",
    )


def _sensitivity(record: CompressionRecord | None) -> Picture:
    title = "What each layer can lose"
    if record is None or record.sensitivity is None:
        return Picture(title, "", "No record of a sensitivity scan: run 'tersetorch compress' with --max-drop.")
    before = record.before.error_percent
    words = (
        f"Error with one layer pruned at a time, by magnitude; the dashed line is the model as it came, {before:.2f} %."
    )
    return Picture(title, charts.sensitivity(record.sensitivity), words)


def _error_by_size(record: CompressionRecord | None) -> Picture:
    title = "Error against size"
    if record is None:
        return Picture(title, "", "No record beside the file: 'tersetorch compress' writes one.")
    points = "; ".join(
        f"{point.label}: {nbytes(point.file_bytes)}, {point.error_percent:.2f} %"
        for point in (record.before, *record.points, record.after)
    )
    how = f", {record.how_pruned}" if record.how_pruned else ""
    return Picture(title, charts.error_by_size(record), f"Models on the way{how}. {points}.")


def _roofline(measured: Measurements | None, table: list[Row]) -> Picture:
    title = "How near each layer is to what the machine can do"
    if measured is None:
        return Picture(title, "", "Not measured: give --input-shape or --input.")
    words = (
        "Operations a second of each layer over its operations a byte moved. Lines are the rates that this machine "
        "reached just now: reading and arithmetic. Small layers lie far below them, since a call costs time too."
    )
    return Picture(title, charts.roofline(measured, table), words)


def nbytes(count: int) -> str:
    """Such as "29.2 kB"."""
    if count < 1000:
        return f"{count} bytes"
    value, unit = (count / 1000, "kB") if count < 10**6 else (count / 10**6, "MB")
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"


def _time(milliseconds: float) -> str:
    return _scaled(milliseconds, (("us", 1e-3), ("ms", 1), ("s", 1000)))


def _joules(picojoules: float) -> str:
    return _scaled(picojoules, (("nJ", 1e3), ("uJ", 1e6), ("mJ", 1e9), ("J", 1e12)))


def _scaled(number: float, units: Sequence[tuple[str, float]]) -> str:
    """Three digits in the largest unit of which there is at least one, or in the first: never 9.42e+03."""
    unit, size = next(((unit, size) for unit, size in reversed(units) if number >= 0.9995 * size), units[0])
    return f"{number / size:.3g} {unit}"
