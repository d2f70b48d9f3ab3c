import sys
from types import SimpleNamespace

import pytest

from tersetorch.cli import main


@pytest.fixture
def tersetorch(capfd, monkeypatch):
    """Runs the command in this process, as its script does."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tersetorch", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        output = capfd.readouterr()
        return SimpleNamespace(returncode=stopped.value.code or 0, stdout=output.out, stderr=output.err)

    return run
