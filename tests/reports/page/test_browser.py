"""The page in Debian's Chromium: TERSETORCH_BROWSER=1 (CI) makes a missing browser an error, elsewhere it is a skip."""

import os
import shutil
from pathlib import Path

import pytest

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
    opened.emulate_media(media="screen")
