import re
import warnings
from dataclasses import replace
from html.parser import HTMLParser

import pytest

import tersetorch as tt
from tersetorch.recipes.compression_record import Point, SensitivityCurves
from tersetorch.reports.page import build_page, charts
from tersetorch.reports.page.rows import rows
from tersetorch.reports.page.words import joules, nbytes, time


class Elements(HTMLParser):
    """All tags with their attributes, ids, and the words."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data.strip())


def test_the_headline_says_before_and_after(page, terse_file, measured, record):
    words = Elements(page).words
    file, found = tt.inspect(terse_file), measured.conversion
    assert nbytes(file.file_bytes) in words and f"before: {nbytes(file.dense_bytes)} as float32" in words
    assert f"{file.dense_bytes / file.file_bytes:.3g}x smaller than float32" in words
    other = (
        f"{record.before.file_bytes / file.file_bytes:.3g}x smaller than the 1.07 MB that the model took in a .terse"
    )
    assert any(other in word for word in words)  # what compress prints, against what it prints it
    assert {"1.72 %", "before: 1.64 %", "+0.08 points"} <= set(words)
    took = "as before" if found.converted_ms is None else time(found.converted_ms)  # what won, if any did
    assert any(took in word for word in words)
    assert f"before: {joules(measured.energy_before.total)}" in words


def test_nothing_is_asked_of_a_network(page):
    for tag, attributes in Elements(page).tags:
        assert tag not in ("link", "iframe", "img", "object", "embed")
        # An <svg> names its namespaces, which nobody fetches, and refers to its own parts.
        for name, value in attributes.items():
            if not name.startswith("xmlns"):
                assert "://" not in (value or ""), (tag, name, value)
            if name.endswith("href"):
                assert value.startswith("#")
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    assert "default-src 'none'" in page


def test_every_id_is_there_once_and_every_reference_meets_one(page):
    tags = Elements(page).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = set(re.findall(r'(?:href="|url\()#([^")]+)', page))
    assert references and references <= set(ids)


def test_rows_hold_every_byte_of_the_tensors(terse_file, measured):
    file = tt.inspect(terse_file)
    table = rows(file, measured)
    assert [row.name for row in table] == ["fc1", "fc2", "fc3"]
    assert sum(row.nbytes for row in table) + file.header_bytes + file.container_bytes == file.file_bytes
    assert table[0].kept == pytest.approx(10, abs=0.01) and table[1].kept == pytest.approx(20, abs=0.01)
    assert [row.runs_as for row in table] == [layer.chosen for layer in measured.conversion.layers]
    for row, layer in zip(table, measured.conversion.layers, strict=True):
        assert row.dense_us == (None if layer.dense_ms is None else 1000 * layer.dense_ms)
        if row.speedup is not None:
            assert row.speedup == row.dense_us / row.runs_us and (row.runs_as == "dense") <= (row.speedup == 1)


@pytest.mark.parametrize(
    "picojoules,words",
    [(12.0, "0.012 nJ"), (2.5e6, "2.5 uJ"), (999_900_000.0, "1 mJ"), (9.42e9, "9.42 mJ"), (3e13, "30 J")],
)
def test_energies_have_a_unit_that_fits(picojoules, words):
    assert joules(picojoules) == words


def test_times_have_a_unit_that_fits():
    assert [time(each) for each in (0.0123, 0.99996, 574.6, 1520.0)] == ["12.3 us", "1 ms", "575 ms", "1.52 s"]


def test_what_was_not_measured_is_said(terse_file):
    words = " ".join(Elements(build_page(tt.inspect(terse_file))).words)
    for sentence in ("not measured", "not recorded", "not counted", "give --input-shape", "Measured on"):
        assert (sentence in words) == (sentence != "Measured on"), sentence


def test_names_in_a_file_are_text(terse_file):
    file = tt.inspect(terse_file)
    name = "<script>alert('&')</script>.weight"
    page = build_page(replace(file, tensors=(replace(file.tensors[0], name=name), *file.tensors[1:])))
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page


def test_the_same_figures_give_the_same_page(page, terse_file, measured, record):
    assert build_page(tt.inspect(terse_file), measured=measured, record=record) == page


def test_a_model_of_many_layers_fits(terse_file):
    file = tt.inspect(terse_file)
    many = tuple(replace(file.tensors[0], name=f"stage.{i}.a_long_name_of_a_block.conv.weight") for i in range(200))
    page = build_page(replace(file, tensors=many))
    assert page.count("<tr>") == 202 + len([n for n in replace(file, tensors=many).parts.values() if n]) + 1
    words = " ".join(Elements(page).words)
    assert f"the {charts.MOST_LAYERS} of 200 layers that take most" in words
    assert f"Not drawn: {200 - charts.MOST_LAYERS} smaller layers, " in words
    # What is not drawn is no bar either, beside which the others would be slivers: the axis ends by the largest layer.
    ends = [_bytes(tick) for tick in ticks(page, "sizes", "x")]
    assert many[0].nbytes / 2 < max(ends) <= 1.03 * many[0].nbytes


def ticks(page, picture, axis):
    """The words at one axis of a picture."""
    svg = page[page.index(f'id="{picture}-figure_1"') :].partition("</svg>")[0]
    found = svg[svg.index(f'id="{picture}-matplotlib.axis_{1 if axis == "x" else 2}"') :]
    found = found.partition(f'id="{picture}-matplotlib.axis_2"')[0] if axis == "x" else found
    labels = re.findall(r'<g id="[^"]*-[xy]tick_\d+">.*?<text[^>]*>([^<]*)</text>', found, flags=re.DOTALL)
    assert labels
    return labels


def _bytes(words):
    number, unit = words.replace(",", "").split()
    return float(number) * {"bytes": 1, "kB": 1000, "MB": 10**6}[unit]


def test_axes_read_plainly(page):
    assert "mathdefault" not in page and "$" not in "".join(re.findall(r"<text.*?</text>", page, flags=re.DOTALL))
    assert ticks(page, "error_by_size", "x") == ["30 kB", "100 kB", "300 kB", "1 MB"]
    for axis in "xy":
        for label in ticks(page, "roofline", axis):
            assert re.fullmatch(r"[1-9][\d,]*|0\.0*[1235]", label), label


@pytest.mark.parametrize("sizes", [(30_000, 30_000), (29_000, 30_000), (1, 10**9), (0, 0), (700, 10**12)])
def test_an_axis_of_sizes_has_a_few_ticks_whatever_it_spans(sizes):
    before, after = (Point(label="a", file_bytes=size, error_percent=1.0) for size in sizes)
    labels = ticks(charts.error_by_size(before, [], after), "error_by_size", "x")
    assert 2 <= len(labels) <= charts.MOST_TICKS and all(
        re.fullmatch(r"[\d,.]+ (bytes|kB|MB)", each) for each in labels
    )


def test_points_that_meet_have_one_label(record):
    shared = record.after.model_copy(update={"label": "shared", "file_bytes": record.after.file_bytes + 20})
    after = record.after.model_copy(update={"label": "in the file"})
    svg = charts.error_by_size(record.before, [*record.points, shared], after)
    words = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert words.count("shared, in the file") == 1 and "dense" in words and "90 % pruned" in words
    assert "shared" not in words and "in the file" not in words


def test_a_record_of_many_points_is_drawn_in_part(terse_file, record):
    many = [Point(label=f"try {i}", file_bytes=20_000 + i, error_percent=i % 97 / 10) for i in range(100_000)]
    curve = [(i / 100_000, 1.0) for i in range(100_000)]
    layers = {f"layer{i}": [(0.5, float(i))] for i in range(99)} | {"fc1": curve}
    long = record.model_copy(
        update={"points": many, "sensitivity": SensitivityCurves(baseline=1.0, layers=layers)},
    )
    page = build_page(tt.inspect(terse_file), record=long)
    assert "Between the two lie 100,000 more, of which 200 are drawn." in page
    assert "the 24 of 100 layers that lose most" in page
    assert page.count("<use") < 1000 and len(page) < 1_000_000
    few = build_page(tt.inspect(terse_file), record=record)
    assert "90 % pruned: 64 kB, 1.58 %" in few and "are drawn" not in few


def test_spread_keeps_the_ends():
    assert list(charts.spread(range(5), 5)) == [0, 1, 2, 3, 4]
    assert list(charts.spread(range(1000), 4)) == [0, 333, 666, 999]


@pytest.mark.parametrize(
    "count,words", [(0, "0 bytes"), (999, "999 bytes"), (28_761, "28.8 kB"), (1_067_000, "1.07 MB")]
)
def test_bytes_in_words(count, words):
    assert nbytes(count) == words


def test_without_jinja2(monkeypatch, terse_file):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(ModuleNotFoundError, match="filled in by jinja2, got no such package"):
        build_page(tt.inspect(terse_file))


def test_names_in_any_script_are_drawn_without_a_warning(terse_file, record):
    point = record.before.model_copy(update={"label": "\u5b57 \u0e01"})
    curves = SensitivityCurves(baseline=1.0, layers={"\u5377\u7a4d": [(0.5, 1.0)]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = build_page(
            tt.inspect(terse_file), record=record.model_copy(update={"points": [point], "sensitivity": curves})
        )
    assert "\u5377\u7a4d" in page and "\u5b57 \u0e01" in page
