import json
from functools import partial

import pytest
from rich.table import Table

from tersetorch.bench.reproduce import ROWS
from tersetorch.bench.reproduce.runs import How, Reproduction, over_seeds, reproduce

FIGURES = {"error": "least", "ratio": "most"}


def one(log, seed, *, progress):
    with open(log, "a") as file:
        file.write(f"{seed}\n")
    if seed == 13:
        raise KeyboardInterrupt
    return {"error": float(seed), "ratio": 10.0 - seed}


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


def ran(log):
    return [int(line) for line in log.read_text().split()] if log.exists() else []


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_keep_the_order_of_the_seeds(log, workers):
    record = over_seeds("x", partial(one, log), How([3, 1, 2], workers=workers), {"epochs": 1}, {"error": 0}, FIGURES)
    assert [row["seed"] for row in record["seeds"]] == [3, 1, 2]
    assert record["mean"] == {"error": 2.0, "ratio": 8.0} and record["worst"] == {"error": 3.0, "ratio": 7.0}
    assert record["plan"] == {"epochs": 1} and record["reproduction"] == "x" and record["machine"]["threads"] >= 1
    assert all(row["seconds"] >= 0 for row in record["seeds"])


def test_a_stopped_run_goes_on_with_the_seeds_that_are_left(log, tmp_path):
    def go(seeds, plan=(1, 2)):
        how = How(seeds, notes=tmp_path / "record.json.notes")
        return over_seeds("x", partial(one, log), how, {"kept": plan}, {}, FIGURES)

    with pytest.raises(KeyboardInterrupt):
        go([0, 1, 13, 2])
    assert ran(log) == [0, 1, 13]
    assert [row["error"] for row in go([0, 1, 2])["seeds"]] == [0, 1, 2]
    assert ran(log) == [0, 1, 13, 2]
    go([0], plan=(3,))
    assert ran(log)[4:] == [0]


def test_it_prints_stores_and_forgets_the_notes(log, tmp_path, capsys):
    row = Reproduction(
        "x",
        "",
        lambda how: over_seeds("x", partial(one, log), how, {}, {}, FIGURES),
        lambda record: Table(str(record["mean"]["error"])),
    )
    reproduce(row, [1, 2], record=tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text())["mean"]["error"] == 1.5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "x.json"]
    assert "1.5" in capsys.readouterr().out


@pytest.mark.parametrize(("how", "message"), [(How([]), "seeds must hold"), (How([0], workers=0), "workers must be")])
def test_bad_ways_are_refused(log, how, message):
    with pytest.raises(ValueError, match=f"run: {message} at least"):
        over_seeds("x", partial(one, log), how, {}, {}, FIGURES)


def test_every_row_is_named_once_and_says_what_it_shows():
    assert all(name == row.name and row.words for name, row in ROWS.items())
    assert {"lenet_300_100", "han_lenet_300_100", "han_lenet_5", "trade_off", "published_densities"} <= set(ROWS)
