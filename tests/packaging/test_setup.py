"""What the build says before it builds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"TERSETORCH_CUDA": "1", "CUDACXX": "/missing/nvcc"}, "needs a working nvcc, found /missing/nvcc; install "),
        (
            {"TERSETORCH_CUDA": "1", "PATH": "/missing"},
            "needs a working nvcc, found none; install the CUDA toolkit or ",
        ),
        ({"TERSETORCH_CUDA": "yes"}, "TERSETORCH_CUDA must be 0, 1 or AUTO, got 'yes'; unset it"),
    ],
)
def test_a_build_that_cannot_have_cuda_says_so_in_one_sentence(environment, sentence):
    unset = {"CUDACXX", "CUDA_PATH"}
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name not in unset} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("tersetorch: ") and done.stderr.count("\n") == 1
    assert sentence in done.stderr
