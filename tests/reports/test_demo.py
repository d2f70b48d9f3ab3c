import io
import sys

import pytest
import torch
from rich.console import Console

from tersetorch.reports import demo
from tersetorch.reports.demo import draw, run_demo, table


@pytest.fixture
def figures():
    def row(network, layer, batch, density, dense, ours, runs_as):
        return {
            "network": network,
            "layer": layer,
            "batch": batch,
            "density": density,
            "dense_ms": dense,
            "ours_ms": ours,
            "runs_as": runs_as,
        }

    return {
        "seed": 3,
        "data": {"name": "mnist", "source": "/data/mnist", "test_images": 10_000},
        "error": {"dense": 0.0164, "compressed": 0.0158},
        "parameters": {"dense": 266_610, "compressed": 13_000},
        "bytes": {"dense": 1_066_868, "gzip": 980_000, "terse": 15_000},
        "path": "lenet300100.terse",
        "file": {},
        "latency": [
            row("LeNet-300-100", "fc1", 1, 0.05, 0.021, 0.007, "csr"),
            row("LeNet-300-100", "whole", 1, None, 0.04, 0.02, "converted"),
            row("AlexNet FC", "fc6", 64, 0.09, 12.0, 6.0, "sparse_codebook"),
            row("AlexNet FC", "whole", 64, None, None, None, "dense"),
        ],
        "weights": {
            "layer": "fc1",
            "limit": 0.5,
            "dense_counts": [0, 10, 100, 10, 0],
            "shared_values": [-0.4, 0.4],
            "shared_counts": [5, 6],
            "pruned": 109,
        },
        "machine": {"cpu": "a CPU", "isa": "avx2", "threads": 2, "torch": "2.13.0"},
    }


def text(figures):
    console = Console(file=io.StringIO(), width=160)
    console.print(table(figures))
    return console.file.getvalue()


def test_table_shows_before_and_after(figures):
    shown = text(figures)
    for words in (
        "LeNet-300-100 on mnist (/data/mnist), seed 3",
        "error on 10,000 test images",
        "1.64 %",
        "1.58 %",
        "266,610",
        "1,066,868",
        "71.1x",
        "LeNet-300-100 fc1, batch 1 (5 % kept)",
        "21 us",
        "12 ms",
        "sparse_codebook",
        "a CPU, avx2, 2 threads",
    ):
        assert words in shown
    [untimed] = [line for line in shown.splitlines() if "AlexNet FC whole" in line]
    assert untimed.count(" - ") == 3


def test_draw_writes_a_picture(figures, tmp_path):
    draw(figures, tmp_path / "demo.png")
    content = (tmp_path / "demo.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 20_000


def test_run_demo_prints_draws_and_restores_threads(figures, tmp_path, monkeypatch):
    seen = []

    def compute(seed, output, *, data, progress):
        seen.append((seed, output, data, torch.get_num_threads()))
        return figures

    monkeypatch.setattr(demo, "compute_demo", compute)
    before = torch.get_num_threads()
    console = Console(file=io.StringIO(), width=160)
    result = run_demo(3, tmp_path, console, data="mnist", threads=1)
    assert seen == [(3, tmp_path, "mnist", 1)]
    assert torch.get_num_threads() == before
    assert result["picture"] == str(tmp_path / "demo.png") and (tmp_path / "demo.png").is_file()
    assert "1.58 %" in console.file.getvalue()


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_bad_threads_are_refused(threads, tmp_path):
    with pytest.raises(ValueError, match="threads must be an int of at least 1, or None, got"):
        run_demo(0, tmp_path, Console(file=io.StringIO()), threads=threads)


def test_missing_matplotlib_is_said_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(demo, "compute_demo", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(ModuleNotFoundError, match=r"drawn by matplotlib.*tersetorch\[report\]"):
        run_demo(0, tmp_path, Console(file=io.StringIO()))
