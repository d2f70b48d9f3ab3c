import pytest
import torch

import tersetorch as tt
from tersetorch.cli.report import measure
from tersetorch.recipes.compression_record import CompressionRecord, Point, SensitivityCurves
from tersetorch.reports.page import build_page


@pytest.fixture(scope="session")
def terse_file(tmp_path_factory):
    torch.manual_seed(0)
    model = tt.zoo.LeNet300100()
    tt.prune.magnitude(model, sparsity={"fc1": 0.9, "fc2": 0.8, "fc3": 0.0})
    tt.quantize.kmeans(model, bits=5, targets="fc1")
    path = tmp_path_factory.mktemp("page") / "lenet.terse"
    tt.save(model, path)
    return path


@pytest.fixture(scope="session")
def measured(terse_file):
    return measure(tt.load(terse_file), torch.randn(1, 784, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="session")
def record():
    return CompressionRecord(
        data="mnist",
        examples=5000,
        before=Point(label="dense", file_bytes=1_066_440, error_percent=1.64),
        after=Point(label="shared", file_bytes=30_000, error_percent=1.72),
        points=[Point(label="90 % pruned", file_bytes=64_000, error_percent=1.58)],
        sensitivity=SensitivityCurves(
            baseline=1.64, layers={"fc1": [(0.5, 1.65), (0.9, 2.4)], "fc2": [(0.5, 1.64), (0.9, 1.9)]}
        ),
        recipe={"prune": {"sparsity": 0.9}},
        seconds=312.0,
    )


@pytest.fixture(scope="session")
def page(terse_file, measured, record):
    return build_page(tt.inspect(terse_file), measured=measured, record=record)
