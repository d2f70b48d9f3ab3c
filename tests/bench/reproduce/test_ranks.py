import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tersetorch.bench.reproduce import __main__, runs
from tersetorch.bench.reproduce.runs import How, over_seeds


def write_idx(path, values):
    head = np.array([0x0800 + values.ndim, *values.shape], dtype=">u4")
    path.write_bytes(head.tobytes() + values.astype(np.uint8).tobytes())


@pytest.fixture
def small_mnist(tmp_path):
    """A folder of ten shades with noise, a few of each."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 72), ("t10k", 20)):
        labels = np.arange(count) % 10
        images = generator.integers(0, 30, (count, 28, 28)) + 20 * labels[:, None, None]
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", labels)
    return tmp_path


@pytest.mark.slow
def test_torchrun_shares_the_trainings_and_rank_0_alone_prints_and_stores(small_mnist):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "tersetorch.bench.reproduce", "lenet_300_100", "--quick", "--seed=0"]
    environment = os.environ | {"TERSETORCH_DATA": str(small_mnist)}
    done = subprocess.run(
        [*command, f"--json={small_mnist / 'record.json'}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("seed 0") == 1
    record = json.loads((small_mnist / "record.json").read_text())
    assert record["ranks"] == 2 and record["plan"]["recipe"]["share"]["bits"] == 4
    assert record["seeds"][0]["layers"]["fc1"]["kept"] == pytest.approx(10, abs=0.1)
    assert not (small_mnist / "record.json.notes").exists()


def test_without_torchrun_it_is_one_process(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(runs, "reproduce", lambda *given, **named: asked.append((*given, named)))
    __main__.main(["trade_off", "--seed=3", "--seed=4", f"--json={tmp_path / 'x.json'}"])
    __main__.main(["trade_off", "--quick", "--threads=2"])
    row = __main__.ROWS["trade_off"]
    assert asked[0] == (row, (3, 4), False, {"threads": 1, "record": tmp_path / "x.json"})
    assert asked[1] == (row, (0, 1, 2), True, {"threads": 2, "record": None})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["nothing"], "invalid choice"), (["dns_lenet_5", "--json=missing/x.json"], "lie in a folder that exists, got")],
)
def test_bad_arguments_are_refused(arguments, sentence, capsys):
    with pytest.raises(SystemExit):
        __main__.main(arguments)
    assert sentence in capsys.readouterr().err


def test_workers_and_ranks_do_not_go_together(monkeypatch):
    monkeypatch.setattr(runs, "ranks", lambda: 2)
    with pytest.raises(ValueError, match="workers must be 1 on 2 ranks, got 3"):
        over_seeds("x", None, How([0], workers=3), {}, {}, {})
