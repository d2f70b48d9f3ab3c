import pytest
from torch import nn

from tersetorch.recipes.cost_curves import file_bytes


def test_a_full_folder_for_temporary_files_is_named(tmp_path, monkeypatch, largest_file):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with (
        largest_file(64),
        pytest.raises(OSError, match=rf"temporary files, .* got {tmp_path} \(File too large\); make room .* TMPDIR"),
    ):
        file_bytes(nn.Linear(8, 4))
    assert list(tmp_path.iterdir()) == [] and file_bytes(nn.Linear(8, 4)).whole > 64
