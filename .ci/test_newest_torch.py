"""Runs the ops library, as built, on the newest torch that the package index offers as a CPU build.

test_newest_torch.py [INDEX]: INDEX is an index of CPU builds, left out when it does not answer.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from importlib.metadata import distribution, version
from pathlib import Path

ROOT = Path(__file__).parent.parent
VENV = ROOT / ".venv-newest"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
# A CUDA build of torch asks for packages of these names; gigabytes that no test here uses.
CUDA_REQUIREMENT = re.compile(r"^(nvidia-|cuda|triton)", re.IGNORECASE)
MOST_VERSIONS_TRIED = 12


def answers(index: str) -> bool:
    """Whether the index can be reached; an unreachable one would stall pip for minutes."""
    try:
        urllib.request.urlopen(f"{index}/torch/", timeout=5).close()
    except OSError:
        return False
    return True


def newest_cpu_build(index_options: list[str]) -> str:
    """Version of the newest torch whose requirements name no CUDA package."""
    excluded = ""
    for _ in range(MOST_VERSIONS_TRIED):
        command = [*PIP, "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps", "--report", "-"]
        done = subprocess.run(
            [*command, *index_options, f"torch>=2.13{excluded}"], capture_output=True, text=True, check=True
        )
        metadata = json.loads(done.stdout)["install"][0]["metadata"]
        if not any(CUDA_REQUIREMENT.match(requirement) for requirement in metadata.get("requires_dist", [])):
            return str(metadata["version"])
        excluded += f",!={metadata['version'].split('+')[0]}"
    raise SystemExit(f"test_newest_torch: the index must offer a CPU build of torch >= 2.13, got none past {excluded}")


def main() -> None:
    """Installs that torch beside the build and runs the tests of ops and layers on it."""
    index = sys.argv[1] if len(sys.argv) > 1 else ""
    options = ["--extra-index-url", index] if index and answers(index) else []
    newest = newest_cpu_build(options)
    if newest == version("torch"):
        print(f"test_newest_torch: the newest CPU build is {newest}, which 'make test' ran on")
        return
    subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    python = VENV / "bin" / "python"
    needed = ["numpy", "safetensors", "rich", "typer", "pydantic", "pyyaml", "pytest", "hypothesis", "scipy"]
    install = [python, "-m", "pip", "install", "--quiet", *options]
    subprocess.run([*install, f"torch=={newest}"], check=True)
    subprocess.run([*install, "--constraint", ROOT / "constraints.txt", *needed], check=True)
    with tempfile.TemporaryDirectory() as folder:
        # The package's metadata without its editable finder.
        metadata = Path(str(distribution("tersetorch").locate_file("")))
        for info in metadata.glob("tersetorch-*.dist-info"):
            shutil.copytree(info, Path(folder) / info.name)
        paths = os.pathsep.join([str(ROOT / "python"), folder])
        subprocess.run(
            [python, "-m", "pytest", "-q", "-m", "not slow", "tests/ops", "tests/nn", "tests/formats"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": paths},
            check=True,
        )
    print(f"test_newest_torch: the library built against torch {version('torch')} passed on {newest}")


if __name__ == "__main__":
    main()
