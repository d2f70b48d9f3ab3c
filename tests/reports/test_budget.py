import sys
from dataclasses import replace

import pytest

from tersetorch.recipes.budget import BudgetReport, BudgetTrial
from tersetorch.reports.budget import draw_budget

TRIALS = tuple(
    BudgetTrial(limit, limit - 1, 0.01, {"conv": part, "head": 0.5}, score)
    for limit, part, score in ((40.0, 0.9, 0.7), (70.0, 0.8, 0.95))
)
FOUND = BudgetReport("bytes", None, 0.96, 0.94, 100.0, {}, {}, 3.0, TRIALS, 1)


def drawn(found, folder, monkeypatch):
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    draw_budget(found, folder / "picture.svg", "accuracy on held-out images")
    return (folder / "picture.svg").read_text()


def test_trials_floor_unit_and_layers_are_named(tmp_path, monkeypatch):
    text = drawn(FOUND, tmp_path, monkeypatch)
    named = ("bytes", "accuracy on held-out images", "floor", "too low", "chosen", "as it came", "conv", "head")
    assert all(f">{name}<" in text for name in named)
    assert ">budget<" not in text


def test_a_budget_that_no_trial_kept(tmp_path, monkeypatch):
    text = drawn(replace(FOUND, budget=80.0, trials=TRIALS[:1], chosen=None), tmp_path, monkeypatch)
    assert ">budget<" in text and ">too low<" in text
    assert ">chosen<" not in text and ">kept the floor<" not in text


def test_a_png_too(tmp_path):
    draw_budget(FOUND, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="draw_budget: the picture must be drawn by matplotlib"):
        draw_budget(FOUND, tmp_path / "picture.png")
