"""The site: the tests beside this one find most faults in seconds, Sphinx finds the others in a minute."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    arguments = ["--quiet", "--fail-on-warning", "--keep-going", "-c", ROOT / "docs", ROOT, tmp_path]
    done = subprocess.run([sys.executable, "-m", "sphinx", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    entry = (tmp_path / "docs" / "api" / "tersetorch.prune.html").read_text()
    assert 'id="tersetorch.prune.magnitude"' in entry and "threshold_std" in entry
    methods = (tmp_path / "docs" / "guide" / "methods.html").read_text()
    assert 'href="../api/tersetorch.prune.html#tersetorch.prune.obs"' in methods
    assert "docs/index.html" in (tmp_path / "index.html").read_text()
