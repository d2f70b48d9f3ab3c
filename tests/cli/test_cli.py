import importlib
import json
import os
import subprocess
from importlib.metadata import metadata, version

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import save_file

import tersetorch as tt
from tersetorch import _native
from tersetorch.cli.shape import parse_shape

# Public names, which stay: docs/design.md, Versions.
DOCTOR_FACTS = [
    *("tersetorch", "package_folder", "python", "platform", "cpu", "cpus", "threads"),
    *("torch", "built_against_torch", "torch_abi", "compiler", "build_type", "native_pieces"),
    *("file_versions_read", "file_version_written"),
    *("compiled_levels", "levels", "active_level", "level_is_forced", "missing_for_level"),
    *("cuda_architectures", "cuda_compiler", "torch_cuda", "missing_for_cuda", "packages", "checks"),
]


@pytest.fixture(scope="module")
def terse_file(tmp_path_factory):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.ReLU(), torch.nn.Linear(30, 10))
    tt.prune.magnitude(model, sparsity=0.8)
    tt.quantize.kmeans(model, bits=4)
    path = tmp_path_factory.mktemp("cli") / "model.terse"
    tt.save(model, path)
    return path


def test_help_names_every_verb(tersetorch):
    done = tersetorch("--help")
    assert done.returncode == 0
    for verb in ("demo", "compress", "convert", "inspect", "report", "doctor", "bench", "reproduce"):
        assert verb in done.stdout


def test_the_version_is_told(tersetorch):
    done = tersetorch("--version")
    assert (done.returncode, done.stdout) == (0, f"tersetorch {tt.__version__}\n")


def test_the_script_is_installed():
    done = subprocess.run(["tersetorch", "inspect"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2 and "Missing argument" in done.stderr


def test_inspect_adds_up(tersetorch, terse_file):
    done = tersetorch("inspect", terse_file, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == tt.inspect(terse_file).to_dict()
    table = tersetorch("inspect", terse_file)
    assert table.returncode == 0 and str(terse_file.stat().st_size) in table.stdout


def test_a_file_that_is_not_terse_gives_one_sentence(tersetorch, tmp_path):
    path = tmp_path / "x.terse"
    path.write_bytes(b"nothing of the kind")
    for done in (tersetorch("inspect", path), tersetorch("convert", path, tmp_path / "y.terse", "--plan", "sparse")):
        assert done.returncode == 1
        assert "Traceback" not in done.stderr and str(path) in done.stderr
    assert not (tmp_path / "y.terse").exists()
    missing = tersetorch("inspect", tmp_path / "missing.terse")
    assert missing.returncode == 1 and "Traceback" not in missing.stderr and "missing.terse" in missing.stderr


def test_convert_follows_a_plan(tersetorch, terse_file, tmp_path):
    output = tmp_path / "fast.terse"
    done = tersetorch("convert", terse_file, output, "--plan", "codebook", "--json")
    assert done.returncode == 0, done.stderr
    assert {layer["chosen"] for layer in json.loads(done.stdout)["layers"]} == {"sparse_codebook"}
    assert json.loads(done.stdout)["max_difference"] is None
    seen = tersetorch("convert", terse_file, output, "--plan", "codebook", "--json", "--input-shape", "3x40")
    assert json.loads(seen.stdout)["max_difference"] < 1e-5
    fast, dense = tt.load(output), tt.load(terse_file)
    assert isinstance(fast[0], tt.nn.SparseCodebookLinear)
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fast(x), dense(x), rtol=1e-5, atol=1e-5)


def test_convert_writes_with_the_coders_it_is_told(tersetorch, terse_file, tmp_path):
    output = tmp_path / "fast.terse"
    done = tersetorch("convert", terse_file, output, "--plan", "sparse", "--coders", "fast")
    assert done.returncode == 0, done.stderr
    assert "contexts" not in {coder for tensor in tt.inspect(output).tensors for coder in tensor.coders}
    assert tersetorch("convert", terse_file, output, "--plan", "sparse", "--coders", "slow").returncode == 2


def test_convert_measures_and_reads_a_state_dict(tersetorch, tmp_path):
    torch.manual_seed(0)
    network = tt.zoo.LeNet300100()
    torch.save(network.state_dict(), tmp_path / "lenet.pt")
    arguments = ("convert", tmp_path / "lenet.pt", tmp_path / "lenet.terse", "--network", "lenet-300-100")
    done = tersetorch(*arguments, "--input-shape", "1x784")
    assert done.returncode == 0, done.stderr
    x = torch.randn(2, 784, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(tt.load(tmp_path / "lenet.terse")(x), network.eval()(x), rtol=1e-4, atol=1e-4)


def test_convert_reads_a_quantised_state_dict(tersetorch, tmp_path):
    network = tt.zoo.LeNet300100().eval()
    state = {}
    for name, tensor in network.state_dict().items():
        state[name] = tensor
        if tensor.dim() == 2:
            scale = tensor.abs().amax(1)
            state[name] = (tensor / scale[:, None] * 127).round().to(torch.int8)
            state[name.replace("weight", "SCB")] = scale
    save_file(state, tmp_path / "lenet.safetensors")
    arguments = ("convert", tmp_path / "lenet.safetensors", tmp_path / "lenet.terse", "--plan", "sparse")
    done = tersetorch(*arguments, "--network", "lenet-300-100")
    assert done.returncode == 0, done.stderr
    expected = tt.storage.import_quantized(state, network)
    x = torch.randn(2, 784, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(tt.load(tmp_path / "lenet.terse")(x), expected(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "arguments,match",
    [
        (
            ["compress", "m.terse", "o.terse", "--recipe", "lenet", "--data", "digits"],
            "--recipe must be one of alexnet",
        ),
        (["compress", "m.terse", "o.terse", "--recipe", "lenet-5", "--data", "digits"], "(did you mean lenet_5?)"),
        (["compress", "m.terse", "o.terse", "--recipe", "lenet_5"], "Missing option '--data'"),
        (["compress", "m.pt", "o.terse", "--recipe", "lenet_5", "--data", "digits"], "a state dict needs --network"),
        (
            ["convert", "model.pt", "out.terse", "--plan", "sparse"],
            "a state dict needs --network: one of lenet-300-100",
        ),
        (
            ["convert", "model.pt", "out.terse", "--network", "VGG"],
            "package.module:function or a .pt2 file, got VGG",
        ),
        (["convert", "model.onnx", "out.terse", "--network", "lenet-300-100"], "must be a .terse, .pt2, .pt, .pth or"),
        (["bench", "sparse", "--quick", "--case", "nosuch"], "must leave something to measure"),
        (["convert", "model.pt", "out.terse", "--network", "LeNet_5"], "got LeNet_5 (did you mean lenet-5?)"),
        (["reproduce", "nothing"], "ROW must be one of"),
        (["reproduce", "trade_off", "--json", "missing/x.json"], "--json must name a file in a folder"),
        (["bench", "nothing"], "SUITE must be one of sparse, codebook, product, binary, binary_networks, fixed, "),
        (["bench", "sparse", "--density", "2"], "should be less than or equal to 1"),
        (["report", "m.terse", "-o", "report.pdf"], "--output must end in .html, got report.pdf"),
        (["frobnicate"], "No such command"),
    ],
)
def test_wrong_usage_is_exit_code_2(tersetorch, arguments, match):
    done = tersetorch(*arguments)
    assert done.returncode == 2
    assert match in " ".join(done.stderr.replace("│", " ").split())


def write_states(folder):
    torch.save(torch.nn.Linear(3, 2).state_dict(), folder / "other.pt")
    torch.save({"state_dict": torch.nn.Linear(3, 2).state_dict()}, folder / "nested.pt")
    torch.save(torch.nn.Linear(3, 2), folder / "whole.pt")
    torch.save([1, 2], folder / "list.pt")
    for name in ("garbage.pt", "garbage.safetensors"):
        (folder / name).write_bytes(b"garbage")
    for name in ("empty.pt", "empty.safetensors"):
        (folder / name).write_bytes(b"")


def test_a_file_without_the_network_gives_one_sentence(tersetorch, tmp_path):
    write_states(tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 8
    for path in [*files, tmp_path / "missing.pt"]:
        arguments = (path, tmp_path / "out.terse", "--network", "lenet-300-100", "--plan", "sparse")
        done = tersetorch("convert", *arguments)
        assert done.returncode == 1
        assert (
            done.stderr.startswith("convert: MODEL must ") and done.stderr.count("\n") == 1 and str(path) in done.stderr
        )
        if path.name == "whole.pt":  # not torch's advice to run it
            assert "it holds torch.nn.modules.linear.Linear, more than tensors and numbers" in done.stderr
    assert not (tmp_path / "out.terse").exists()


@pytest.mark.parametrize("around", ["state_dict", "model_state_dict", "model", ""])
def test_a_checkpoint_of_a_training_loop_is_read(tersetorch, tmp_path, around):
    network = tt.zoo.LeNet300100().eval()
    state = {f"module._orig_mod.{name}": value for name, value in network.state_dict().items()}
    torch.save({around: state, "epoch": 3} if around else state, tmp_path / "checkpoint.pt")
    output = tmp_path / "lenet.terse"
    done = tersetorch("convert", tmp_path / "checkpoint.pt", output, "--network", "lenet-300-100", "--plan", "sparse")
    assert done.returncode == 0, done.stderr
    assert torch.equal(tt.load(output).fc1.weight, network.fc1.weight)


def test_names_that_a_network_has_itself_stay(tersetorch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n\ndef wrapped():\n    made = nn.Sequential()\n"
        "    made.add_module('module', nn.Linear(4, 3))\n    return made\n"
    )
    torch.save({"module.weight": torch.eye(3, 4), "module.bias": torch.zeros(3)}, "wrapped.pt")
    done = tersetorch("convert", "wrapped.pt", "o.terse", "--network", "nets:wrapped", "--plan", "sparse")
    assert done.returncode == 0, done.stderr
    assert torch.equal(tt.load("o.terse").module.weight, torch.eye(3, 4))


def test_measuring_needs_a_shape(tersetorch, terse_file, tmp_path):
    done = tersetorch("convert", terse_file, tmp_path / "fast.terse")
    assert done.returncode == 2 and "needs --input-shape or --input" in " ".join(done.stderr.split())


NETS = """
from torch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.layer, self.other = nn.Embedding(9, 4), nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, ids, other):
        return self.layer(self.words(ids).mean(1)) + self.other(other)

class Said(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.read = nn.GRU(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.read(self.rnn(x)[0])

def half():
    return nn.Sequential(nn.Linear(4, 3)).bfloat16()
"""


def test_inputs_come_from_a_file(tersetorch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "inputs_nets.py").write_text(NETS)
    made = importlib.import_module("inputs_nets")
    torch.save(made.Two().state_dict(), "two.pt")
    ids, other = np.arange(6).reshape(2, 3), np.ones((2, 2), np.float32)
    np.savez("by_name.npz", other=other, ids=ids)
    np.savez("in_order.npz", ids, other)
    save_file({"ids": torch.from_numpy(ids), "other": torch.from_numpy(other)}, "by_name.safetensors")
    common = ("convert", "two.pt", "o.terse", "--network", "inputs_nets:Two")
    for name in ("by_name.npz", "in_order.npz", "by_name.safetensors"):
        done = tersetorch(*common, "--input", name, "--json")
        assert done.returncode == 0, done.stderr
        assert len(json.loads(done.stdout)["layers"]) == 3
    np.savez("wrong.npz", ids=ids, others=other)
    np.savez("empty.npz")
    (tmp_path / "garbage.npz").write_bytes(b"PK garbage")
    for name, code, words in (
        ("wrong.npz", 1, "example_inputs must be what the model is called with"),
        ("none.npz", 1, "--input must exist"),
        ("garbage.npz", 1, "--input must hold arrays of numbers"),
        ("empty.npz", 1, "--input must hold an array for each argument"),
        ("two.pt", 2, "--input must be a .npz or .safetensors file"),
    ):
        for plan in ("measure", "sparse"):  # which measures nothing, but says how much the outputs differ
            done = tersetorch(*common, "--input", name, "--plan", plan)
            assert done.returncode == code and words in " ".join(done.stderr.replace("│", " ").split()), done.stderr
    both = tersetorch(*common, "--input", "by_name.npz", "--input-shape", "1x4")
    assert both.returncode == 2 and "must not come together" in both.stderr


def test_random_inputs_have_the_type_of_the_weights(tersetorch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "half_nets.py").write_text(NETS)
    torch.save(importlib.import_module("half_nets").half().state_dict(), "half.pt")
    done = tersetorch("convert", "half.pt", "o.terse", "--network", "half_nets:half", "--input-shape", "2x4")
    assert done.returncode == 0, done.stderr


def test_convert_names_the_weights_that_no_kernel_takes(tersetorch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "said_nets.py").write_text(NETS)
    torch.save(importlib.import_module("said_nets").Said().state_dict(), "said.pt")
    done = tersetorch("convert", "said.pt", "o.terse", "--network", "said_nets:Said", "--plan", "sparse")
    assert "no kernels are for these, which stay dense: rnn.weight_ih_l0, rnn.weight_hh_l0\n" in done.stderr


def test_a_narrow_terminal_gets_a_narrow_table(tersetorch, terse_file, monkeypatch):
    wide = tersetorch("inspect", terse_file).stdout
    monkeypatch.setenv("COLUMNS", "60")
    narrow = tersetorch("inspect", terse_file).stdout
    assert max(map(len, wide.splitlines())) > 60 >= max(map(len, narrow.splitlines()))
    for tensor in tt.inspect(terse_file).tensors:
        assert f"│ {tensor.name}" in narrow and f" {tensor.nbytes} │" in narrow


def test_a_terminal_without_lines_for_tables_gets_what_it_can(terse_file):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(["tersetorch", "inspect", terse_file], env=environment, capture_output=True, check=False)
    assert done.returncode == 0 and b"? bytes ?" in done.stdout, done.stderr


def test_doctor_checks_every_level(tersetorch):
    done = tersetorch("doctor", "--json")
    facts = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert set(facts["checks"]) == set(facts["levels"])
    assert facts["levels"] + list(facts["missing_for_level"]) == ["scalar", "avx2", "avx512", "avx512bf16"]
    assert facts["cuda_architectures"] == _native.build_facts()["cuda_architectures"]
    assert (facts["missing_for_cuda"] is None) == bool(facts["cuda_architectures"] and torch.cuda.is_available())
    assert list(facts) == DOCTOR_FACTS
    build = _native.build_facts()
    assert (facts["torch"], facts["torch_abi"], facts["build_type"]) == (torch.__version__, "2.13", "Release")
    assert bool(facts["cuda_compiler"]) == bool(build["cuda_architectures"])
    assert facts["file_version_written"] in facts["file_versions_read"] == [1, 2]
    assert facts["active_level"] in facts["levels"] and len(facts["native_pieces"]) == 3
    assert facts["packages"]["numpy"] == {"version": version("numpy"), "extras": []}
    assert facts["packages"]["onnx"] == {"version": version("onnx"), "extras": ["bench", "onnx"]}
    for checks in facts["checks"].values():
        assert {check["case"] for check in checks} >= {"float32", "bfloat16", "codebook", "gradient of x"}
        assert all(check["ok"] and check["max_error"] <= check["bound"] for check in checks)


def test_doctor_knows_every_extra_of_users_and_says_what_is_missing(monkeypatch, capsys):
    from tersetorch.cli import doctor

    assert {*doctor.EXTRAS, "dev", "docs"} == set(metadata("tersetorch").get_all("Provides-Extra"))
    monkeypatch.setattr(doctor, "_check", lambda level: [])
    known = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("h5py", "rich") else known(name))
    doctor.doctor(as_json=False)
    told = " ".join(capsys.readouterr().out.split())
    assert "not installed: h5py; needed for tersetorch.storage.read_larq (pip install 'tersetorch[larq]')" in told
    assert "not installed: rich; needed for tersetorch itself" in told
    assert (
        f"torch {torch.__version__}; built against" in told and "files of version 1 and 2 are read, 2 written" in told
    )


def test_doctor_fails_when_an_op_is_wrong(monkeypatch):
    from tersetorch.cli import doctor

    wrong = {"op": "csr_matmul", "case": "float32", "max_error": 1.0, "bound": 1e-6, "ok": False}
    monkeypatch.setattr(doctor, "_check", lambda level: [wrong])
    with pytest.raises(typer.Exit) as stopped:
        doctor.doctor(as_json=False)
    assert stopped.value.exit_code == 1


def test_reproduce_lists_runs_and_stores(tersetorch, tmp_path, monkeypatch):
    from tersetorch.bench import reproduce

    names = tersetorch("reproduce", "--names").stdout.split()
    assert names == list(reproduce.ROWS)
    listed = tersetorch("reproduce")
    assert listed.returncode == 0 and all(name in listed.stdout for name in names)
    seen = []

    def run(how):
        seen.append((tuple(how.seeds), how.quick, how.workers, how.notes, torch.get_num_threads()))
        return {"seeds": list(how.seeds)}

    row = reproduce.runs.Reproduction("small", "", run, lambda record: str(record))
    monkeypatch.setitem(reproduce.ROWS, "small", row)
    path = tmp_path / "small.json"
    done = tersetorch("reproduce", "small", "--seed", 4, "--seed", 2, "--quick", "--workers", 3, "--json", path)
    assert done.returncode == 0, done.stderr
    assert seen == [((4, 2), True, 3, tmp_path / "small.json.notes", 1)]
    assert json.loads(path.read_text()) == {"seeds": [4, 2]}


def test_shapes():
    assert parse_shape("1x784") == [1, 784] and parse_shape("8X3x2") == [8, 3, 2]
    for bad in ("", "0x3", "axb", "1x", "-1x2", "1x\u00b2"):
        with pytest.raises(typer.BadParameter, match="positive sizes joined by x"):
            parse_shape(bad)
    with pytest.raises(typer.BadParameter, match="at most 1073741824 numbers"):
        parse_shape("1x99999999999999")


def test_bench_shows_and_stores(tersetorch, tmp_path, monkeypatch):
    from tersetorch.bench import rates
    from tersetorch.bench.suites import sparse

    monkeypatch.setattr(rates, "LARGEST", 2**16)
    monkeypatch.setattr(rates, "QUICK_SECONDS", 1e-4)
    monkeypatch.setattr(sparse, "QUICK_SECONDS", 1e-3)
    path = tmp_path / "new folder" / "records.json"
    arguments = ("bench", "sparse", "--quick", "--case", "ffn up", "--peers", "F.linear,onednn packed float32")
    done = tersetorch(*arguments, "--implementation", "float32", "--implementation", "csr", "--json", path)
    assert done.returncode == 0, done.stderr
    stored = json.loads(path.read_text())
    names = {record["implementation"] for record in stored["records"]}
    assert {"torch F.linear float32", "oneDNN packed float32", "tersetorch csr"} <= names
    assert not any("CSR" in name for name in names)
    assert {record["case"] for record in stored["records"]} == {"transformer ffn up"}
    assert "tersetorch csr" in done.stdout and "transformer ffn up" in done.stdout
    limits = tersetorch("bench", "rates", "--quick")
    assert limits.returncode == 0 and "multiply-adds float32" in limits.stdout and "16 KiB" in limits.stdout


def test_a_bad_level_gives_one_sentence(run_python):
    environment = {**os.environ, "TERSETORCH_CPU_ISA": "mmx"}
    command = subprocess.run(["tersetorch", "doctor"], env=environment, capture_output=True, text=True, check=False)
    assert command.returncode == 2
    assert command.stderr.startswith("tersetorch: TERSETORCH_CPU_ISA must be") and command.stderr.count("\n") == 1
    imported = run_python("import tersetorch", TERSETORCH_CPU_ISA="mmx")
    assert imported.returncode == 1 and "ImportError: tersetorch: TERSETORCH_CPU_ISA must be" in imported.stderr


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x.terse"])
def test_convert_refuses_a_pipe_without_waiting(tersetorch, tmp_path, name):
    os.mkfifo(tmp_path / name)
    done = tersetorch("convert", tmp_path / name, tmp_path / "y.terse", "--network", "lenet-5", "--plan", "sparse")
    assert done.returncode == 2 and "MODEL must be a regular file" in done.stderr


def test_convert_refuses_a_state_that_is_not_real(tersetorch, tmp_path):
    state = tt.zoo.NETWORKS["lenet-300-100"]().state_dict()
    name = next(iter(state))
    torch.save({**state, name: torch.complex(state[name], state[name])}, tmp_path / "x.pt")
    arguments = ("convert", tmp_path / "x.pt", tmp_path / "y.terse", "--network", "lenet-300-100", "--plan", "sparse")
    done = tersetorch(*arguments)
    assert done.returncode == 1 and f"{name} must be real, got a complex tensor" in done.stderr
    assert not (tmp_path / "y.terse").exists()


def test_a_state_with_masks_is_to_be_finalized_first(tersetorch, tmp_path):
    model = tt.prune.magnitude(tt.zoo.NETWORKS["lenet-300-100"](), 0.5)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    arguments = ("convert", tmp_path / "x.pt", tmp_path / "y.terse", "--network", "lenet-300-100", "--plan", "sparse")
    done = tersetorch(*arguments)
    assert done.returncode == 1 and "have parametrizations" in done.stderr, done.stderr
    assert "call tersetorch.finalize(model) before" in done.stderr
    torch.save(tt.finalize(model).state_dict(), tmp_path / "x.pt")
    assert tersetorch(*arguments).returncode == 0


def test_outputs_are_checked_before_any_work(tersetorch, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("COLUMNS", "400")
    demo = tersetorch("demo", "--output", tmp_path / "file")
    assert demo.returncode == 2 and "--output must name a folder, got the file" in demo.stderr
    for path in (tmp_path, tmp_path / "file" / "x.json"):
        bench = tersetorch("bench", "rates", "--json", path)
        assert bench.returncode == 2 and "--json must name a file that can be written" in bench.stderr
