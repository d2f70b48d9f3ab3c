import json
import os
import signal
from contextlib import suppress

import pytest
import torch
from torch import nn

from tersetorch.recipes.run_folder import RunFolder, locked


def model():
    torch.manual_seed(0)
    return nn.Linear(8, 4)


def run_in(folder, **changes):
    options = {"settings": {"epochs": 3}, "limits": {"budget": 5}, "restart": ["points"], "points": [], "before": None}
    return RunFolder("compress", folder, **options | changes)


def stored(folder):
    """A folder with a run that was stopped."""
    with run_in(folder) as run:
        run.keep(model(), "first")
        run.store(before={"error": 1.5, "bytes": 10**20}, points=[(0.1, float("nan"))])
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_run_goes_on_with_what_was_stored(tmp_path):
    with run_in(stored(tmp_path)) as run:
        assert run.record["before"] == {"error": 1.5, "bytes": 10**20} and run.record["points"][0][0] == 0.1
        assert torch.equal(run.kept("first")["weight"], model().weight) and run.kept("none") is None
        run.forget("first")
        assert run.kept("first") is None
        run.store()
    with run_in(tmp_path) as run:
        assert run.record["states"] == {}


def test_other_limits_start_parts_and_states_again(tmp_path):
    with run_in(stored(tmp_path), limits={"budget": 6}) as run:
        assert run.record["points"] == [] and run.record["before"] is not None
        assert run.kept("first") is None and run.record["states"] == {}


def test_one_other_bit_in_a_state_is_refused(tmp_path):
    path = stored(tmp_path) / "first.safetensors"
    whole = path.read_bytes()
    for place in (0, 12, len(whole) - 2):
        data = bytearray(whole)
        data[place] ^= 64
        path.write_bytes(data)
        with (
            run_in(tmp_path) as run,
            pytest.raises(ValueError, match=f"^compress: folder must hold each state as .* got {path} .*; delete the"),
        ):
            run.kept("first")


def test_what_is_no_file_in_the_place_of_a_state_is_refused(tmp_path):
    path = stored(tmp_path) / "first.safetensors"
    path.unlink()
    for make in (os.mkfifo, os.mkdir):
        with suppress(FileNotFoundError):
            path.unlink()
        make(path)
        with run_in(tmp_path) as run, pytest.raises(ValueError, match=f"got {path} .*no regular file.*; delete the"):
            run.kept("first")


def test_a_state_that_the_record_does_not_know_is_refused(tmp_path):
    with run_in(stored(tmp_path)) as run:
        run.keep(model(), "second")  # and the run is stopped before it stores that
    with run_in(tmp_path) as run:
        with pytest.raises(ValueError, match=r"got .*second[.]safetensors"):
            run.kept("second")
        run.kept("first")
        run.keep(model(), "second")  # as the run that goes on does
        assert torch.equal(run.kept("second")["weight"], model().weight)


def without(name):
    return lambda record: record.pop(name)


@pytest.mark.parametrize(
    "edit",
    [
        without("before"),
        without("states"),
        without("settings"),
        without("sha256"),
        lambda record: record.update(before="x"),
        lambda record: record.update(points=5),
        lambda record: record.update(points=[{"a": 1}]),
        lambda record: record["before"].update(error=1.25),
        lambda record: record.update(settings=3),
        lambda record: record.update(sha256=None),
    ],
)
def test_an_edited_record_is_refused_and_nothing_written(tmp_path, edit):
    path = stored(tmp_path) / "record.json"
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"^compress: folder must hold a run's record .* got {path} \(.*; delete the"):
        run_in(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"5", b"null", b"\xff", b"[" * 100_000, b"9" * 5000, b'{"a":1}'])
def test_what_is_no_record_is_refused(tmp_path, text):
    (tmp_path / "record.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"^compress: folder must hold a run's record .*record\.json \(.*; delete the"):
        run_in(tmp_path)
    with locked("compress", tmp_path):
        pass  # what was refused keeps nobody out


def test_what_is_no_file_in_the_place_of_a_record_is_refused(tmp_path):
    for name, make in (("a", os.mkdir), ("b", os.mkfifo)):
        (tmp_path / name).mkdir()
        make(tmp_path / name / "record.json")
        with pytest.raises(ValueError, match=r"got .*record\.json \(it is no regular file\); delete the folder"):
            run_in(tmp_path / name)


def test_two_runs_at_once_are_refused(tmp_path):
    before = contents(stored(tmp_path))
    with run_in(tmp_path), run_in(tmp_path / "steps"):
        with pytest.raises(ValueError, match=f"^compress: folder must be in use by no other run, got {tmp_path}"):
            run_in(tmp_path)
        assert contents(tmp_path) == before
    with pytest.raises(KeyboardInterrupt), run_in(tmp_path):
        raise KeyboardInterrupt
    run_in(tmp_path).__exit__(None, None, None)


def test_a_killed_run_keeps_nobody_out(tmp_path):
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with run_in(tmp_path):
                os.write(told, b"!")
                signal.pause()
        finally:
            os._exit(1)
    try:
        assert os.read(ready, 1) == b"!"
        with pytest.raises(ValueError, match="in use by no other run"):
            run_in(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(told)
    with run_in(tmp_path) as run:
        assert run.record["points"] == []


def test_a_full_disk_names_the_folder_and_leaves_what_was_there(tmp_path, largest_file):
    with run_in(stored(tmp_path)) as run:
        before = contents(tmp_path)
        rule = f"^compress: folder must be one that can be written, got {tmp_path}/{{}} .File too large.*; make room"
        with largest_file(64):
            with pytest.raises(OSError, match=rule.format("second.safetensors")):
                run.keep(model(), "second")
            with pytest.raises(OSError, match=rule.format("record.json")):
                run.store(points=[1])
    assert contents(tmp_path) == before
