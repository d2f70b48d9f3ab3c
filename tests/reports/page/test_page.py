import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

import tersetorch as tt
from tersetorch.reports.page import build_page
from tersetorch.reports.page.page import _joules, _time, nbytes
from tersetorch.reports.page.rows import rows


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
    assert nbytes(file.file_bytes) in words and f"before: {nbytes(file.dense_bytes)}" in words
    assert f"{file.dense_bytes / file.file_bytes:.3g}x smaller" in words
    assert {"1.72 %", "before: 1.64 %", "+0.08 points"} <= set(words)
    time = "as before" if found.converted_ms is None else _time(found.converted_ms)  # what won, if any did
    assert any(time in word for word in words)
    assert f"before: {_joules(measured.energy_before.total)}" in words


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
    assert _joules(picojoules) == words


def test_times_have_a_unit_that_fits():
    assert [_time(each) for each in (0.0123, 0.99996, 574.6, 1520.0)] == ["12.3 us", "1 ms", "575 ms", "1.52 s"]


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
    assert "all else" in page


@pytest.mark.parametrize(
    "count,words", [(0, "0 bytes"), (999, "999 bytes"), (28_761, "28.8 kB"), (1_067_000, "1.07 MB")]
)
def test_bytes_in_words(count, words):
    assert nbytes(count) == words


def test_without_jinja2(monkeypatch, terse_file):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(ModuleNotFoundError, match="filled in by jinja2, got no such package"):
        build_page(tt.inspect(terse_file))
