"""The page in Debian's Chromium: TERSETORCH_BROWSER=1 (CI) makes a missing browser an error, elsewhere it is a skip."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import tersetorch as tt
from tersetorch.recipes.compression_record import SensitivityCurves
from tersetorch.reports.page import build_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SCREENSHOTS = Path(__file__).parents[3] / "build" / "screenshots"


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None and not os.environ.get("TERSETORCH_BROWSER"):
        pytest.skip("no Chromium: install Debian's package chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture(params=[("desktop", 1280, 900), ("phone", 390, 844)], ids=lambda param: param[0])
def opened(request, browser, page, tmp_path):
    """The page in a window of each size, and what the browser complained of."""
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    name, width, height = request.param
    tab = browser.new_page(viewport={"width": width, "height": height})
    complaints, requests = [], []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto((tmp_path / "report.html").as_uri())
    yield tab
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=SCREENSHOTS / f"report_{name}.png", full_page=True)
    assert complaints == [] and all(url.startswith("file:") for url in requests)
    tab.close()


def first_column(tab):
    return tab.locator("#layers tbody tr:visible td:first-child").all_inner_texts()


def test_it_renders_in_the_window(opened):
    assert opened.locator("h1").inner_text() == "lenet.terse"
    assert opened.locator(".cards li").count() == 4
    assert opened.locator("figure svg").count() == 4
    for box in (opened.locator("figure svg").nth(i).bounding_box() for i in range(4)):
        assert box["width"] > 250 and box["height"] > 100
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")  # only tables scroll sideways


def test_headings_sort_by_number_and_by_word(opened):
    heading = opened.locator("#layers th", has_text="bytes")
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert first_column(opened) == ["fc3", "fc2", "fc1"]  # as text, 3 digits and a comma would come otherwise
    heading.locator("button").focus()
    opened.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "descending"
    assert first_column(opened) == ["fc1", "fc2", "fc3"]
    opened.locator("#layers th", has_text="weight").locator("button").click()
    assert heading.get_attribute("aria-sort") == "none"
    assert first_column(opened) == ["fc3", "fc2", "fc1"]  # 10x100, 100x300, 300x784


def test_names_like_numbers_sort_as_names(browser, terse_file, tmp_path):
    file = tt.inspect(terse_file)
    tensors = [replace(file.tensors[0], name=f"{name}.weight") for name in ("a", "1e3", "20", "0x1", "3", "Infinity")]
    (tmp_path / "report.html").write_text(build_page(replace(file, tensors=tuple(tensors))), encoding="utf-8")
    tab = browser.new_page()
    tab.goto((tmp_path / "report.html").as_uri())
    tab.locator("#layers th", has_text="layer").locator("button").click()
    assert first_column(tab) == ["0x1", "1e3", "3", "20", "a", "Infinity"]
    tab.close()


def test_the_filter_keeps_rows_that_match(opened):
    opened.get_by_label("Show layers with").fill("FC2")
    assert first_column(opened) == ["fc2"] and opened.get_by_role("status").inner_text() == "1 of 3"
    opened.get_by_label("Show layers with").fill("nothing")
    assert first_column(opened) == []
    opened.get_by_label("Show layers with").fill("")
    assert len(first_column(opened)) == 3


def test_names_and_contrast_are_accessible(opened):
    from axe_playwright_python.sync_playwright import Axe

    results = Axe().run(opened)
    found = [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in results.response["violations"]]
    assert found == []
    checked = {rule["id"] for rule in results.response["passes"]}
    assert {"color-contrast", "button-name", "label", "role-img-alt"} <= checked


def test_it_prints(opened):
    opened.emulate_media(media="print")
    assert not opened.get_by_label("Show layers with").is_visible()
    assert opened.evaluate("getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"
    breaks = "[...document.querySelectorAll('h2, h3')].map((title) => getComputedStyle(title).breakAfter)"
    assert set(opened.evaluate(breaks)) == {"avoid"}  # no title alone at the end of a sheet
    opened.emulate_media(media="screen")


@pytest.fixture(scope="module")
def page_of_long_names(terse_file, measured, record):
    """Names of 230 letters, as a model of blocks in blocks has them."""

    def long(name):
        layer, dot, tensor = name.partition(".")
        return f"{'blocks_of_attention_' * 10}{'W' * 27}{layer}{dot}{tensor}"

    file = tt.inspect(terse_file)
    tensors = tuple(replace(tensor, name=long(tensor.name)) for tensor in file.tensors)
    energies = {
        which: replace(energy, layers=tuple(replace(layer, name=long(layer.name)) for layer in energy.layers))
        for which in ("energy_before", "energy_after")
        for energy in [getattr(measured, which)]
    }
    conversion = replace(
        measured.conversion,
        layers=tuple(replace(layer, names=tuple(map(long, layer.names))) for layer in measured.conversion.layers),
    )
    curves = SensitivityCurves(baseline=1.64, layers={long(f"fc{i}"): [(0.5, 1.7 + i)] for i in (1, 2, 3)})
    return build_page(
        replace(file, tensors=tensors),
        measured=replace(measured, conversion=conversion, **energies),
        record=record.model_copy(update={"sensitivity": curves}),
    )


@pytest.mark.parametrize("media,width", [("screen", 360), ("print", 718)])  # a small phone; A4 less its margins
def test_long_names_leave_room_for_the_rest(browser, page_of_long_names, tmp_path, media, width):
    (tmp_path / "report.html").write_text(page_of_long_names, encoding="utf-8")
    tab = browser.new_page(viewport={"width": width, "height": 800})
    tab.emulate_media(media=media)
    tab.goto((tmp_path / "report.html").as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert tab.locator("#layers td:first-child").first.bounding_box()["width"] <= width / 2
    last = tab.locator("#layers tbody tr:first-child td").last.bounding_box()
    assert media == "screen" or last["x"] + last["width"] <= width  # on a screen the table scrolls
    cut = """[...document.querySelectorAll("figure svg text")].filter((text) => {
        const box = text.getBoundingClientRect(), frame = text.ownerSVGElement.getBoundingClientRect();
        return box.left < frame.left - 1 || box.right > frame.right + 1;
    }).map((text) => text.textContent)"""
    assert tab.evaluate(cut) == []
    tab.close()
