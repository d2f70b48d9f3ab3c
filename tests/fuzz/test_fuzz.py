"""A minute of fuzzing on every change, more of it in make test-full, and whether the fuzzer finds anything."""

import importlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent


def fuzz(*arguments):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    }
    return subprocess.run(
        [sys.executable, "-m", "fuzz", *map(str, arguments)], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "targets,seconds",
    [
        (("files", "coders", "exported", "foreign", "recipes"), 14),
        pytest.param(("files",), 120, marks=pytest.mark.slow),
        pytest.param(("coders", "exported", "foreign", "recipes"), 60, marks=pytest.mark.slow),
    ],
)
def test_hostile_input_is_read_or_refused_in_a_sentence(targets, seconds, tmp_path):
    done = fuzz(*targets, "--seconds", seconds, "--corpus", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_crash_that_coverage_leads_to_is_found_kept_and_replayed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(TESTS))
    engine = importlib.import_module("fuzz.engine")
    source = tmp_path / "parser.py"
    source.write_text(
        "def parse(data):\n"
        "    at = 0\n"
        "    for byte in b'BUG!':\n"
        "        if at >= len(data) or data[at] != byte:\n"
        "            raise ValueError(f'must be a bug, got {at} right')\n"
        "        at += 1\n"
        "        if at == 2:\n"
        "            at = int(2)\n"
        "        if at == 3:\n"
        "            at = int(3)\n"
        "    return data[99]\n"
    )
    scope = {}
    exec(compile(source.read_text(), str(source), "exec"), scope)

    def mutate(rng, data, other):
        return data[: rng.randrange(len(data) + 1)] + bytes([rng.choice(b"!BGUX")])

    def session(name, run, refusals=(ValueError,)):
        target = engine.Target(lambda: [b"x"], run, mutate, refusals, (str(source),))
        return engine.Session(target, tmp_path / name, tmp_path / f"{name}-corpus")

    found = session("crashes", scope["parse"])
    found.fuzz(60, 20_000, seed=0)
    (crash,) = found.found
    assert crash.read_bytes() == b"BUG!"
    assert "IndexError" in crash.with_suffix(".txt").read_text()
    assert "IndexError" in engine.observe(found.target, crash.read_bytes())[1]
    assert len(list((tmp_path / "crashes-corpus").iterdir())) >= 3
    assert not (tmp_path / "crashes" / "running").exists()

    again = session("again", scope["parse"])
    again.fuzz(60, 20_000, seed=0)
    assert (again.runs, again.corpus) == (found.runs, found.corpus)

    def wordless(data):
        raise ValueError("no")

    def endless(data):
        while True:
            random.random()

    monkeypatch.setattr(engine, "SECONDS", 0.2)
    for run, came in ((wordless, "ValueError: no"), (endless, "Hang: more than 0.2 seconds")):
        one = session(came[:4], run)
        one.fuzz(60, 1, seed=0)
        assert came in one.found[0].with_suffix(".txt").read_text()
