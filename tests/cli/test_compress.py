import importlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import typer

import tersetorch as tt
from tersetorch.cli.compress import _bytes
from tersetorch.cli.data_source import _complete_data
from tersetorch.cli.model_file import _complete_network
from tersetorch.recipes.compression_record import CompressionRecord
from tersetorch.recipes.run_folder import locked

RECIPE = """
prune: {sparsity: {fc1: 0.8, fc2: 0.7}, rounds: 1, train: {epochs: 8, lr: 0.1}}
share: {bits: {"fc*": 4}, train: {epochs: 1, lr: 0.001, optimizer: adam}}
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with a trained network in every form that compress takes, its recipe and its data."""
    monkeypatch.chdir(tmp_path)
    digits = tt.zoo.load("digits")
    torch.manual_seed(0)
    network = tt.zoo.LeNet300100(64)
    tt.zoo.fit(network, digits.train_images, digits.train_labels, epochs=4, batch_size=32)
    tt.save(network, "dense.terse")
    torch.save(network.state_dict(), "dense.pt")
    np.savez("digits.npz", images=(255 * digits.train_images).byte().numpy(), labels=digits.train_labels.numpy())
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "my_code.py").write_text(
        "import tersetorch as tt\n\ndef network():\n    return tt.zoo.LeNet300100(64)\n\n"
        "def data():\n    return tt.zoo.load('digits')\n\ndef broken():\n    raise RuntimeError('no disk')\n"
    )
    return tmp_path


BASE = ("--recipe", "recipe.yaml", "--data", "digits", "--batch-size", "32", "-o", "small.terse")


def test_compress_prunes_shares_and_stores(tersetorch, files):
    done = tersetorch("compress", "dense.terse", *BASE, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["file"] == tt.inspect(files / "small.terse").to_dict()
    small = tt.load("small.terse")
    assert small.fc1.weight.count_nonzero() == round(0.2 * 300 * 64) and small.fc1.weight.unique().numel() == 16
    record = CompressionRecord.read("small.record.json")
    assert {key: found[key] for key in record.model_dump()} == json.loads(record.model_dump_json())
    assert [point.label for point in record.points] == ["pruned", "shared"]
    data = tt.zoo.load("digits")
    assert record.after.error_percent == 100 * tt.zoo.error_rate(small, data.validation_images, data.validation_labels)
    assert record.after.file_bytes == found["file"]["file_bytes"] < record.before.file_bytes / 10
    assert not (files / "small.run").exists()


@pytest.mark.parametrize(
    "model,more",
    [
        ("dense.pt", ("--network", "my_code:network")),
        ("dense.pt2", ()),
        ("dense.terse", ("--data", "digits.npz")),
        ("dense.terse", ("--data", "my_code:data")),
    ],
)
def test_compress_takes_models_and_data_of_the_users_own(tersetorch, files, model, more):
    if model.endswith(".pt2"):
        batch = torch.export.Dim("batch")
        network, example = tt.load("dense.terse"), (torch.rand(3, 1, 8, 8),)
        torch.export.save(torch.export.export(network, example, dynamic_shapes=({0: batch},)), model)
    done = tersetorch("compress", model, *BASE, *more)
    assert done.returncode == 0, done.stderr
    assert "fc1.weight" in done.stdout and "% after" in done.stdout
    same = tt.storage.import_exported("dense.pt2") if model.endswith("pt2") else None
    small = tt.load("small.terse", model=same)
    assert small.fc1.weight.count_nonzero() == round(0.2 * 300 * 64)
    if same is not None:  # the program comes back by the file that it came from
        done = tersetorch("report", "small.terse", "-o", "r.html", "--network", model, "--input-shape", "1x1x8x8")
        assert done.returncode == 0, done.stderr


def test_compress_goes_on_where_it_was_stopped(tersetorch, files, monkeypatch):
    whole = tersetorch("compress", "dense.terse", *BASE, "--json")
    expected = (files / "small.terse").read_bytes()
    calls = []

    def stops(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit(*arguments, **options)

    from tersetorch.recipes import trainer

    fit = trainer.fit
    monkeypatch.setattr(trainer, "fit", stops)
    (files / "small.terse").unlink()
    stopped = tersetorch("compress", "dense.terse", *BASE)
    assert stopped.returncode != 0 and not (files / "small.terse").exists() and (files / "small.run").is_dir()
    again = tersetorch("compress", "dense.terse", *BASE, "--json")
    assert again.returncode == 0, again.stderr
    assert len(calls) == 3 and (files / "small.terse").read_bytes() == expected
    first, second = json.loads(whole.stdout), json.loads(again.stdout)
    assert first["points"] == second["points"]


def test_compress_goes_on_with_the_same_data_alone_and_ends_no_input(tersetorch, files, monkeypatch):
    from tersetorch.recipes import trainer

    def stops(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "fit", stops)
    own = (*BASE, "--data", "digits.npz")
    assert tersetorch("compress", "dense.terse", *own).returncode != 0 and (files / "small.run").is_dir()
    for other in (("--seed", "1"), ("--batch-size", "16")):
        again = tersetorch("compress", "dense.terse", *own, *other)
        assert again.returncode == 1 and "folder must hold a run with the same model and arguments" in again.stderr
    stored = dict(np.load("digits.npz"))
    np.savez("digits.npz", images=stored["images"], labels=stored["labels"][::-1])
    again = tersetorch("compress", "dense.terse", *own)
    assert again.returncode == 1 and "other" in again.stderr
    stored["images"] = stored["images"].astype(np.float32)
    stored["images"][3, 0, 2, 2] = np.nan
    np.savez("digits.npz", **stored)
    nan = tersetorch("compress", "dense.terse", *own, "--dry-run")
    assert nan.returncode == 1 and "must be finite, got NaN or infinity" in nan.stderr
    for name in ("dense.terse", "recipe.yaml", "digits.npz"):
        before = (files / name).read_bytes()
        done = tersetorch("compress", "dense.terse", *own, "-o", name)
        rule = "must be none that is read" if name.endswith(".terse") else "must end in .terse"
        assert done.returncode == 2 and rule in " ".join(done.stderr.split())
        assert (files / name).read_bytes() == before


def test_compress_within_a_drop(tersetorch, files):
    done = tersetorch("compress", "dense.terse", *BASE, "--max-drop", "3", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["after"]["error_percent"] <= found["before"]["error_percent"] + 3
    assert found["after"]["file_bytes"] < found["before"]["file_bytes"] / 8
    assert set(found["sensitivity"]["layers"]) == {"fc1", "fc2", "fc3"}


def test_compress_within_a_budget(tersetorch, files):
    done = tersetorch("compress", "dense.terse", *BASE, "--budget", "20x", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    limit = found["before"]["file_bytes"] // 20
    assert 0.7 * limit < found["after"]["file_bytes"] <= limit
    assert found["after"]["file_bytes"] == (files / "small.terse").stat().st_size
    none = tersetorch("compress", "dense.terse", *BASE, "--budget", "300", "--folder", "other")
    assert none.returncode == 1 and "compress: budget must be at least about" in none.stderr


def test_limits_that_cannot_be_kept_write_nothing(tersetorch, files):
    (files / "recipe.yaml").write_text(
        "prune: {sparsity: 0, rounds: 1, train: {epochs: 0, lr: 0.1}}\nshare: {bits: 1, train: {epochs: 0, lr: 0.1}}"
    )
    done = tersetorch("compress", "dense.terse", *BASE, "--max-drop", "0", "--budget", "50x")
    assert done.returncode == 1 and "must not rise by more than 0 points" in done.stderr
    assert not (files / "small.terse").exists() and not (files / "small.record.json").exists()


def test_a_dry_run_says_what_would_be_done(tersetorch, files):
    before = sorted(files.iterdir())
    done = tersetorch("compress", "dense.terse", *BASE, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert [(layer["name"], layer["sparsity"], layer["bits"]) for layer in plan["layers"]] == [
        ("fc1", 0.8, 4),
        ("fc2", 0.7, 4),
        ("fc3", 0.0, 4),
    ]
    assert plan["trainings"] == [
        "prune and retrain, 8 epochs",
        "share weights and train the shared values, 1 epoch",
    ]
    assert sorted(files.iterdir()) == before
    assert tersetorch("compress", "dense.terse", *BASE).returncode == 0
    assert plan["file_bytes"] == pytest.approx((files / "small.terse").stat().st_size, rel=0.1)
    words = tersetorch("compress", "dense.terse", *BASE, "--dry-run", "--max-drop", "1").stdout
    assert "found within the limits" in words and "for each trial" in words


def test_what_a_recipe_leaves_as_it_is_is_said(tersetorch, files):
    (files / "my_rnn.py").write_text(
        "from torch import nn\n\n\nclass Words(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.rnn, self.fc = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 10)\n\n"
        "    def forward(self, x):\n        return self.fc(self.rnn(x.flatten(1, -2))[0][:, -1])\n"
    )
    words = ("dense.pt", *BASE, "--dry-run", "--network", "my_rnn:Words")
    sys.path.insert(0, str(files))
    try:
        torch.save(importlib.import_module("my_rnn").Words().state_dict(), "dense.pt")
        (files / "recipe.yaml").write_text("share: {bits: 4}")
        done = tersetorch("compress", *words, "--json")
        assert done.returncode == 0, done.stderr
        assert "91 % of the weights stay as they are; name them in the recipe" in done.stderr
        assert json.loads(done.stdout)["untouched"] == {"rnn.weight_ih_l0": 512, "rnn.weight_hh_l0": 1024}
        (files / "recipe.yaml").write_text("share: {bits: {'rnn.weight_*': 4, fc: 3}}")
        done = tersetorch("compress", *words, "--json")
        assert "stay as they are" not in done.stderr
        plan = json.loads(done.stdout)
        assert [(layer["name"], layer["bits"]) for layer in plan["layers"]] == [
            ("rnn.weight_ih_l0", 4),
            ("rnn.weight_hh_l0", 4),
            ("fc", 3),
        ]
    finally:
        sys.path.remove(str(files))


def test_a_recipe_without_training(tersetorch, files):
    (files / "recipe.yaml").write_text("prune: {method: obs, sparsity: 0.5}\nshare: {bits: 4}")
    words = tersetorch("compress", "dense.terse", *BASE, "--dry-run").stdout
    assert "prune by second derivatives (calibrated on up to 512 training examples), without training" in words
    done = tersetorch("compress", "dense.terse", *BASE)
    assert done.returncode == 0, done.stderr
    assert "pruned by second derivatives, calibrated on up to 512 training examples, not retrained" in done.stdout
    small, digits = tt.load("small.terse"), tt.zoo.load("digits")
    order = torch.randperm(len(digits.train_images), generator=torch.Generator().manual_seed(0))[:512]
    batches = digits.train_images[order].split(32)
    expected = tt.prune.obs(tt.load("dense.terse"), batches, 0.5, refine=3)
    tt.finalize(tt.prune.obs(expected, batches, 0.0, bits=4, refine=3))
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in expected.state_dict().items())
    found = json.loads(tersetorch("compress", "dense.terse", *BASE, "--seed", "1", "--json").stdout)
    assert found["recipe"]["prune"]["method"] == "obs" and found["points"] == []


@pytest.mark.parametrize(
    "arguments,code,sentence",
    [
        (("--budget", "many"), 2, "--budget must be a number of bytes"),
        (("--budget", "0"), 2, "--budget must be a number of bytes"),
        (("--network", "my_code:network.x y"), 2, "--network must be one of"),
        (("--network", "my_code:missing"), 1, "--network must name a function that works without arguments"),
        (("--network", "my_code:data"), 1, "--network must give an nn.Module, got Dataset"),
        (("--data", "cats"), 2, "--data must be one of mnist"),
        (("--data", "my_code:network"), 1, "--data must give a tersetorch.zoo.Dataset, got LeNet300100"),
        (("--data", "my_code:broken"), 1, "RuntimeError: no disk"),
        (("--data", "none.npz"), 1, "read_dataset: path must exist"),
        (("twice.terse",), 2, "must come once, as OUTPUT or --output"),
        (("-o", "small.bin"), 2, "must end in .terse, got small.bin"),
        # the record's name is longer
        (("-o", "x" * 245 + ".terse"), 1, "compress: path must name a file that can be written, got"),
        (("--folder", "dense.pt"), 1, "compress: folder must be one that can be written, got dense.pt (File exists)"),
    ],
)
def test_bad_arguments_get_a_sentence(tersetorch, files, arguments, code, sentence):
    done = tersetorch("compress", "dense.terse", *BASE, *arguments)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert sentence in " ".join(done.stderr.replace("│", " ").split())
    assert not (files / "small.terse").exists()


def test_two_runs_at_once_in_one_folder_are_refused(tersetorch, files):
    (files / "recipe.yaml").write_text("share: {bits: 4}")
    run = files / "small.run"
    run.mkdir()
    with locked("compress", run):
        second = tersetorch("compress", "dense.terse", *BASE)
    assert second.returncode == 1 and not (files / "small.terse").exists()
    assert f"compress: folder must be in use by no other run, got {run}, which is; wait" in second.stderr
    assert [path.name for path in run.iterdir()] == ["lock"]
    done = tersetorch("compress", "dense.terse", *BASE)
    assert done.returncode == 0 and not run.exists(), done.stderr


@pytest.mark.parametrize("text", ["1" + 400 * "0", "1" + 304 * "0" + "gb", 400 * "9" + "x", "9999x", "0.5", "1 2", ""])
def test_a_budget_that_is_no_number_of_bytes_is_refused(text):
    with pytest.raises(typer.BadParameter, match=r"^--budget must be a number .{,150}; give another"):
        _bytes(text, 2000)


def test_a_budget_as_a_person_types_it():
    assert [_bytes(text, 2000) for text in ("1.5MB", "30000", "2 KiB", "20x")] == [1_500_000, 30_000, 2048, 100]


def test_a_typo_in_a_recipe_names_the_field(tersetorch, files):
    (files / "recipe.yaml").write_text("prune: {sparsty: 0.9, rounds: 1, train: {epochs: 1, lr: 0.1, optimizer: sdg}}")
    done = tersetorch("compress", "dense.terse", *BASE)
    assert done.returncode == 1 and "did you mean sparsity?" in done.stderr and "'sgd' or 'adam'" in done.stderr
    (files / "recipe.yaml").write_text("prune: {method: obs, sparsity: 0.9, calibraton: 9}")
    done = tersetorch("compress", "dense.terse", *BASE)
    assert done.returncode == 1 and "did you mean calibration?" in done.stderr
    (files / "recipe.yaml").write_text("prune: {sparsity: 0.9, calibration: 9}")
    done = tersetorch("compress", "dense.terse", *BASE)
    assert done.returncode == 1 and "calibration must be left out where method is 'magnitude', got 9" in done.stderr


def test_the_shell_completes_names():
    line = "tersetorch compress m.terse --recipe len"
    environment = os.environ | {"_TERSETORCH_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": "4"}
    done = subprocess.run(["tersetorch"], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["lenet_300_100", "lenet_5"]
    assert _complete_network("squeezenet-1") == ["squeezenet-1.0", "squeezenet-1.1"]
    assert _complete_data("m") == ["mnist"]
