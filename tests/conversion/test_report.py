import copy
import json
import pickle

import pytest
import torch
from torch import nn

from tersetorch.conversion import ConversionReport, LayerReport, Trial, convert, report


@pytest.fixture
def conversion():
    trials = (
        Trial("csr", "faster: ...", 0.5, 0.5, 15, 15, 1e-7),
        Trial("sparse_codebook", "not tried: more than 255 distinct non-zero values"),
    )
    return ConversionReport(
        layers=(
            LayerReport(
                "a[0]", ("a[0]", "b"), "Linear", (3, 2), 0.5, 7, "csr", "faster: ...", "dense", 1.0, 0.01, False, trials
            ),
            LayerReport("", ("",), "Conv2d", (), None, None, "dense", "no format runs a Conv2d"),
        ),
        reason="The converted model is faster.",
        dense_ms=2.0,
        converted_ms=1.0,
        ratio=0.5,
        wins=15,
        max_difference=1e-7,
        machine={"cpu": "a CPU", "isa": "avx2", "threads": 1, "load": 0.25, "torch": "2.13"},
    )


def test_plain_data_and_back(conversion):
    data = json.loads(json.dumps(conversion.to_dict()))
    assert ConversionReport.from_dict(data) == conversion
    assert data["plan"] == conversion.plan == {"a[0]": "csr", "": "dense"}


def test_table_says_everything(conversion):
    text = str(conversion)
    for part in (
        "a[0], b",
        "(the model)",
        "Linear 3x2",
        "csr: 0.5 ms, x0.50, won 15/15, differs by 1e-07",
        "not tried: 1 more",
        "no format runs a Conv2d",
        "The converted model is faster.",
        "Largest output difference: 1e-07",
        "Measured on a CPU, avx2, 1 threads, load 0.2, torch 2.13",
    ):
        assert part in text


def test_report_travels_with_the_model_but_not_in_its_state(sparse_linear):
    fast = convert(nn.Sequential(sparse_linear()), plan="sparse")
    expected = report(fast)
    assert report(copy.deepcopy(fast)) == expected
    assert report(pickle.loads(pickle.dumps(fast))) == expected
    assert set(fast.state_dict()) == {"0.row_offsets", "0.col_indices", "0.values", "0.bias"}


def test_only_converted_models_have_one():
    with pytest.raises(ValueError, match="model must come from convert, got a Sequential without a report"):
        report(nn.Sequential())
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got Tensor"):
        report(torch.zeros(1))
