"""What a new user does: pip install into an environment that has nothing, then a first model.

Downloads torch, a CPU build where the configured index offers one, once; the sdist is compiled once more.
"""

import json
import os
import subprocess
import venv
from pathlib import Path

import pytest

from tersetorch.storage.container import VERSION

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.slow
FIRST_MODEL = """
import numpy as np, torch, tersetorch as tt
torch.manual_seed(0)
model = tt.zoo.LeNet300100(64)
x = torch.rand(5, 64)
tt.save(model, "dense.terse")
tt.prune.magnitude(model, sparsity=0.9)
tt.quantize.kmeans(model, bits=4)
tt.save(model, "small.terse")
model = tt.finalize(model).eval()
loaded = tt.load("small.terse")
assert torch.equal(loaded(x), model(x))
fast = tt.convert(loaded, plan="sparse")
assert torch.allclose(fast(x), loaded(x), atol=1e-5) and type(fast.fc1) is not torch.nn.Linear
assert tt.inspect("small.terse").file_bytes < tt.inspect("dense.terse").file_bytes / 8
rng = np.random.default_rng(0)
np.savez("data.npz", images=rng.integers(0, 256, (240, 64), np.uint8), labels=rng.integers(0, 10, 240))
open("recipe.yaml", "w").write(
    "prune: {sparsity: {fc1: 0.8}, rounds: 1, train: {epochs: 1, lr: 0.1}}\\n"
    "share: {bits: {fc1: 4}, train: {epochs: 1, lr: 0.001}}\\n"
)
print(tt.__version__, tt.__file__)
"""


class Environment:
    """An environment of its own, a home that is a file, and a folder to work in whose path has a space."""

    def __init__(self, folder, building):
        self.prefix, self.work = folder / "an environment", folder / "some work"
        venv.create(self.prefix, with_pip=True)
        self.work.mkdir()
        kept = {name: building[name] for name in building if name.startswith(("PIP_", "SSL_", "CMAKE_", "CCACHE_"))}
        self.variables = (
            {"CCACHE_DIR": str(self.work / "ccache")}
            | kept
            | {  # else in the home
                "PATH": f"{self.prefix}/bin:{os.defpath}",
                "HOME": "/dev/null",
                "TMPDIR": str(self.work),
            }
        )
        self.variables["PIP_CACHE_DIR"] = os.environ.get("PIP_CACHE_DIR", str(Path.home() / ".cache" / "pip"))

    def run(self, *command, fails=False):
        done = subprocess.run(
            [str(part) for part in command],
            cwd=self.work,
            env=self.variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stdout + done.stderr if fails else done.stdout

    def install(self, *what, fails=False):
        command = ("python", "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", *what)
        return self.run(*command, fails=fails)

    def use(self, version):
        """A first model, every verb that needs no data but what is there, and what pip says of the versions."""
        self.run("python", "-m", "pip", "check")
        told, file = self.run("python", "-c", FIRST_MODEL).split(" ", 1)
        assert told == version and file.startswith(str(self.prefix))
        facts = json.loads(self.run("tersetorch", "doctor", "--json"))
        assert facts["tersetorch"] == version and facts["package_folder"].startswith(str(self.prefix))
        assert facts["file_version_written"] == VERSION
        assert facts["packages"]["torch"]["version"].split("+")[0] == "2.13.0"
        assert facts["packages"]["matplotlib"] == {"version": None, "extras": ["report", "demo", "bench"]}
        compress = ("compress", "dense.terse", "out.terse", "--recipe", "recipe.yaml", "--data", "data.npz", "--json")
        compressed = json.loads(self.run("tersetorch", *compress))
        inspected = json.loads(self.run("python", "-m", "tersetorch", "inspect", self.work / "out.terse", "--json"))
        assert inspected == compressed["file"]
        self.run("tersetorch", "convert", "out.terse", "fast.terse", "--input-shape", "1x64")
        told = self.run("tersetorch", "report", "out.terse", "-o", "report.html", fails=True)
        assert told.count("\n") == 1 and "must be drawn by matplotlib, got no such package; run pip install " in told
        assert self.run("tersetorch", "reproduce", "--names").split()


@pytest.fixture(scope="module")
def environment(tmp_path_factory, building):
    return Environment(tmp_path_factory.mktemp("new user"), building)


def test_without_torch_the_sdist_says_what_to_install_first(environment, sdist):
    told = environment.install("--no-deps", sdist, fails=True)
    assert "the build needs torch >= 2.13 in this environment, found none; run 'pip install torch==2.13.0 " in told


def test_the_wheel_installs_and_works(environment, dist):
    (wheel,) = (path for path in dist.glob("*.whl") if "+cuda" not in path.name)
    environment.install(wheel)
    environment.use(wheel.name.split("-")[1])


def test_the_sdist_does_the_same(environment, sdist):
    environment.install("setuptools", "cmake", "ninja", "pybind11")
    environment.run("python", "-m", "pip", "uninstall", "--yes", "tersetorch")
    environment.variables["TERSETORCH_CUDA"] = "0"
    environment.install("--no-build-isolation", sdist)
    environment.use(sdist.name.removesuffix(".tar.gz").split("-")[1])


def test_with_an_older_torch_one_sentence_says_so(environment, tmp_path):
    """What `pip install --no-deps torch==2.12` leaves, without the download."""
    info = tmp_path / "torch-2.12.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.12.0\n")
    environment.variables["PYTHONPATH"] = str(tmp_path)
    sentence = "tersetorch: torch must be 2.13 or newer, got 2.12.0; upgrade torch with pip"
    try:
        assert environment.run("tersetorch", "doctor", fails=True).strip() == sentence
        assert environment.run("python", "-m", "tersetorch", "doctor", fails=True).strip() == sentence
        told = environment.run("python", "-c", "import tersetorch", fails=True)
        assert told.strip().splitlines()[-1] == f"ImportError: {sentence}"
    finally:
        del environment.variables["PYTHONPATH"]
