"""What the README and the docs claim is compared with stored results; tests/docs runs what they show."""

import re
from pathlib import Path

from tersetorch.bench.tables import PAGES, render

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_is_short():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(example.splitlines()) <= 12


def test_every_command_shown_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    shown = set(re.findall(r"\bmake ([a-z][a-z-]*)", README))
    assert shown and shown <= targets


def test_tables_are_those_of_the_stored_results():
    for page in PAGES:
        text = (ROOT / page).read_text()
        assert render(text) == text, f"{page}: run 'make tables'"
