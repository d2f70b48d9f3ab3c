"""What other people's files and folders may not do to the person who types the command."""

import json
import os
import sys
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

import tersetorch as tt
from tersetorch.recipes.compression_record import (
    MOST_BYTES,
    CompressionRecord,
    Point,
    SensitivityCurves,
    record_path,
)
from tersetorch.storage import container

ESCAPE = "\x1b]0;gone\x07\x1b[2J"


def named(path, name):
    """A file whose second layer has this name."""
    model = nn.Sequential(nn.Linear(4, 3))
    model.add_module("layer", nn.Linear(3, 2))
    tt.save(model, path)
    header, data, _, _ = container.unpack(path.read_bytes())
    header["m"]["m"] = {name if key == "layer" else key: child for key, child in header["m"]["m"].items()}
    streams = container.split(data, [stream[1] for entry in header["t"] for stream in entry["x"]])
    path.write_bytes(container.pack(header, streams))
    return path


@pytest.mark.parametrize("name", [ESCAPE, "a\nb", "\u202etxt", "\x9b2J", "\0"])
def test_names_that_a_terminal_would_obey_are_refused(tersetorch, tmp_path, name):
    path = named(tmp_path / "m.terse", name)
    for verb in (("inspect",), ("inspect", "--json"), ("report", "-o", tmp_path / "r.html")):
        done = tersetorch(verb[0], path, *verb[1:])
        assert done.returncode == 1 and "without control characters" in done.stderr
        assert all(letter.isprintable() or letter == "\n" for letter in done.stdout + done.stderr)
    with pytest.raises(ValueError, match="without control characters"):
        tt.load(path)
    model = nn.Sequential()
    model.add_module(name, nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"save: model must have names .* without control characters"):
        tt.save(model, tmp_path / "n.terse")


def test_refusals_quote_nothing_that_a_terminal_would_obey(tersetorch, tmp_path):
    tt.save(nn.Linear(3, 2), tmp_path / "m.terse")
    raw = (tmp_path / "m.terse").read_bytes()
    head = raw.replace(b'{"terse":"2"}', b'{"terse":"\\u001b[2J"}')
    length = int.from_bytes(raw[:8], "little") + len(head) - len(raw)
    (tmp_path / "m.terse").write_bytes(length.to_bytes(8, "little") + head[8:])
    done = tersetorch("inspect", tmp_path / "m.terse")
    assert done.returncode == 1 and "version" in done.stderr and "\x1b" not in done.stderr
    done = tersetorch("inspect", tmp_path / f"{ESCAPE}.terse")
    assert done.returncode == 1 and "\x1b" not in done.stderr


@pytest.mark.parametrize(
    "name",
    ["</svg><script>x()</script>", '"><img src=x onerror=x()>', "$\\frac{$", "{{7*7}}&lt;"],
)
def test_a_report_shows_names_as_they_are(tersetorch, tmp_path, name):
    path = named(tmp_path / "m.terse", name)
    point = Point(label=f"{name}{ESCAPE}", file_bytes=10, error_percent=1.0)
    curves = SensitivityCurves(baseline=1.0, layers={name: [(0.5, 1.0)]})
    texts = {"data": name, "recipe": {name: f"{name}{ESCAPE}"}}
    CompressionRecord(**texts, examples=3, before=point, after=point, points=[point], sensitivity=curves).write(
        record_path(path)
    )
    done = tersetorch("report", path, "-o", tmp_path / "r.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "r.html").read_text()
    assert page.count("<script") == 1 and "<img" not in page
    assert "\x1b" not in page and "javascript:" not in page
    shown = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert f"<td>{shown.replace(chr(34), '&#34;')}</td>" in page


def test_output_is_not_the_input(tersetorch, tmp_path):
    path = tmp_path / "m.terse"
    tt.save(nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 10)), path)
    before = path.read_bytes()
    done = tersetorch("convert", path, path, "--plan", "sparse")
    assert done.returncode == 2 and "must be none that is read" in " ".join(done.stderr.split())
    assert path.read_bytes() == before


def test_output_is_not_the_code_of_the_network(tersetorch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_nets").mkdir()
    tt.save(nn.Linear(4, 3), "m.terse")
    for code in ("mine.py", "my_nets/mine.py", "my_nets/__init__.py"):
        (tmp_path / code).write_text("raise SystemExit\n")
        name = code.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        done = tersetorch("report", "m.terse", "-o", code, "--network", f"{name}:network")
        assert done.returncode == 2 and "must be none that is read" in " ".join(done.stderr.split())
        assert (tmp_path / code).read_text() == "raise SystemExit\n"


def test_a_name_that_is_no_utf_8_is_shown_as_far_as_it_can_be(tersetorch, tmp_path):
    path = tmp_path / os.fsdecode(b"bad\xff.terse")
    tt.save(nn.Linear(4, 3), path)
    done = tersetorch("report", path, "-o", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert "bad?.terse" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_what_the_system_says_gets_a_sentence(tersetorch, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules["tersetorch.cli.inspect"], "inspect_file", full)
    done = tersetorch("inspect", "m.terse")
    assert done.returncode == 1
    assert done.stderr.startswith(
        "tersetorch: standard output must be there and have room, got No space left on device;"
    )


def folder(path):
    path.mkdir()
    (path / "thesis.txt").write_text("years")


def link(path):
    folder(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


@pytest.mark.parametrize("make", [folder, link, lambda path: path.write_text("years")])
def test_a_run_takes_no_folder_of_somebody_else(tersetorch, tmp_path, make):
    tt.save(tt.zoo.LeNet300100(64), tmp_path / "dense.terse")
    (tmp_path / "recipe.yaml").write_text("prune: {sparsity: {fc1: 0.8}, rounds: 1, train: {epochs: 1, lr: 0.1}}\n")
    make(tmp_path / "small.run")
    given = ("--recipe", tmp_path / "recipe.yaml", "--data", "digits", "-o", tmp_path / "small.terse")
    done = tersetorch("compress", tmp_path / "dense.terse", *given)
    assert done.returncode == 1 and "small.run must be free to keep the run in" in done.stderr
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"years"]
    assert kept and not (tmp_path / "small.terse").exists()
    if os.getuid() == 0:
        (tmp_path / "other.run").mkdir()
        os.chown(tmp_path / "other.run", 12345, 12345)
        done = tersetorch("compress", tmp_path / "dense.terse", *given[:-1], tmp_path / "other.terse")
        assert done.returncode == 1 and "must be free" in done.stderr


def test_weights_that_inflate_are_refused(tersetorch, tmp_path):
    state = {"fc1.weight": torch.zeros(300, 784)}
    torch.save(state, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as old,
        zipfile.ZipFile(tmp_path / "deflated.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    given = ("--network", "lenet-300-100", "--plan", "sparse")
    done = tersetorch("convert", tmp_path / "deflated.pt", tmp_path / "m.terse", *given)
    assert done.returncode == 1 and "deflated files, which torch does not write" in done.stderr


def test_damaged_files_end_in_a_sentence(tersetorch, tmp_path):
    tt.save(nn.Linear(3, 2), tmp_path / "m.terse")
    whole = (tmp_path / "m.terse").read_bytes()
    for name in ("bad.terse", "bad.pt2", "bad.pt", "bad.safetensors", "bad.npz"):
        for data in (b"", b"\x80\x02.", whole[:50], b"PK\3\4" + whole, json.dumps({"a": 1}).encode(), bytes(100)):
            (tmp_path / name).write_bytes(data)
            if name.endswith(".npz"):
                given = ("--recipe", "lenet_300_100", "--data", tmp_path / name, "-o", tmp_path / "o.terse")
                done = tersetorch("compress", tmp_path / "m.terse", *given)
            else:
                given = ("--network", "lenet-300-100", "--plan", "sparse")
                done = tersetorch("convert", tmp_path / name, tmp_path / "o.terse", *given)
            assert done.returncode in (1, 2) and done.stderr and "Traceback" not in done.stderr
            assert not (tmp_path / "o.terse").exists()


def endless(path, kind):
    """A file that a reader would never come to the end of."""
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_lies_beside_a_file_is_no_record_unless_it_ends(tersetorch, tmp_path, kind):
    tt.save(nn.Linear(3, 2), tmp_path / "m.terse")
    endless(record_path(tmp_path / "m.terse"), kind)
    for how in ((), ("--record", record_path(tmp_path / "m.terse"))):
        done = tersetorch("report", tmp_path / "m.terse", "-o", tmp_path / "r.html", *how)
        assert done.returncode == 1 and "path must name a regular file, got the device or pipe" in done.stderr
    record_path(tmp_path / "m.terse").unlink()
    with open(record_path(tmp_path / "m.terse"), "wb") as file:
        file.truncate(MOST_BYTES + 1)
    done = tersetorch("report", tmp_path / "m.terse", "-o", tmp_path / "r.html")
    assert done.returncode == 1 and "path must name a file of at most 16,777,216 bytes, got 16,777,217" in done.stderr


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", ["x.npz", "x.safetensors"])
def test_inputs_come_from_files_that_end(tersetorch, tmp_path, name, kind):
    tt.save(nn.Linear(3, 2), tmp_path / "m.terse")
    endless(tmp_path / name, kind)
    done = tersetorch("report", tmp_path / "m.terse", "-o", tmp_path / "r.html", "--input", tmp_path / name)
    assert done.returncode == 1 and "report: --input must name a regular file, got the device or pipe" in done.stderr


def test_inputs_do_not_inflate_without_end(tersetorch, tmp_path):
    tt.save(nn.Linear(3, 2), tmp_path / "m.terse")
    np.savez_compressed(tmp_path / "x.npz", np.zeros(17 << 20, np.float32))
    done = tersetorch("convert", tmp_path / "m.terse", tmp_path / "n.terse", "--input", tmp_path / "x.npz")
    assert done.returncode == 1 and "71303296 bytes in parts of" in done.stderr
    (tmp_path / "x.npz").write_bytes(b"PK")
    done = tersetorch("convert", tmp_path / "m.terse", tmp_path / "n.terse", "--input", tmp_path / "x.npz")
    assert done.returncode == 1 and "--input must hold arrays of numbers" in done.stderr


@pytest.mark.parametrize("verb", [("bench", "rates"), ("reproduce", "gong")])
def test_figures_go_to_files_that_end(tersetorch, tmp_path, verb):
    os.mkfifo(tmp_path / "x.json")
    done = tersetorch(*verb, "--quick", "--json", tmp_path / "x.json")
    assert done.returncode == 2 and "--json must name a" in done.stderr


@pytest.mark.parametrize(
    "read",
    [
        lambda path: tt.storage.import_exported(path),
        lambda path: tt.storage.import_quantized(path.with_suffix(".safetensors"), nn.Linear(3, 2)),
        lambda path: tt.storage.read_quantized(path.with_suffix(".gguf")),
        lambda path: tt.storage.read_deep_compression(path, {"a": [2, 3]}),
    ],
)
def test_importers_do_not_wait_for_a_pipe(tmp_path, read):
    for suffix in (".net", ".safetensors", ".gguf"):
        os.mkfifo(tmp_path / f"x{suffix}")
    with pytest.raises(ValueError, match="must name a regular file, got the device or pipe"):
        read(tmp_path / "x.net")


def pickled(path, pickle):
    """The file of a state dict, with another pickle in it."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, pickle if name.endswith("data.pkl") else data)


def most(name):
    """A pickle that calls name with 256 MiB."""
    return b"\x80\x02c" + name + b"\nJ\x00\x00\x00\x10\x85R."


@pytest.mark.parametrize("name", [b"__builtin__\nbytearray", b"_codecs\nencode", b"torch\nTensor"])
def test_states_make_no_objects_as_large_as_they_like(tersetorch, tmp_path, name):
    path = tmp_path / "x.pt"
    pickled(path, most(name))
    done = tersetorch("convert", path, tmp_path / "y.terse", "--network", "lenet-5", "--plan", "sparse")
    assert done.returncode == 1 and f"got one with {name.decode().replace(chr(10), '.')} in it" in done.stderr
    with pytest.raises(ValueError, match=r"read_pruned_state: .*x\.pt must be an archive that torch\.save wrote"):
        tt.storage.read_pruned_state(path)
    archive = path.read_bytes()
    # torch takes the second for an old file by its start, zipfile for a zip archive by its end
    for text in (most(name), most(name) + archive):
        path.write_bytes(text)
        done = tersetorch("convert", path, tmp_path / "y.terse", "--network", "lenet-5", "--plan", "sparse")
        assert done.returncode == 1 and "must be a whole zip archive, as torch.save writes since 1.6" in done.stderr
        with pytest.raises(ValueError, match="load an older file once and save it again"):
            tt.storage.read_pruned_state(path)


def test_states_in_files_of_before_1_6_are_told_from_others(tersetorch, tmp_path):
    state = tt.zoo.NETWORKS["lenet-300-100"]().state_dict()
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    given = ("--network", "lenet-300-100", "--plan", "sparse")
    done = tersetorch("convert", tmp_path / "old.pt", tmp_path / "y.terse", *given)
    assert done.returncode == 1 and "load an older file once and save it again" in done.stderr
    torch.save(torch.load(tmp_path / "old.pt"), tmp_path / "new.pt")
    assert tersetorch("convert", tmp_path / "new.pt", tmp_path / "y.terse", *given).returncode == 0


def test_every_kind_of_tensor_is_read_from_a_state(tmp_path):
    kept = nn.Parameter(torch.ones(2))
    kept.note = "text"
    state = {"kept": kept, "empty": torch.empty(0, 3), "sparse": torch.eye(3).to_sparse(), "meta": torch.ones(2).bool()}
    state |= {str(dtype): torch.ones(2).to(dtype) for dtype in (torch.float8_e4m3fn, torch.uint16, torch.complex64)}
    torch.save(state, tmp_path / "x.pt")
    assert set(tt.storage.read_pruned_state(tmp_path / "x.pt")) == set(state)
