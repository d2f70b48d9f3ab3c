import json

import pytest
import torch

from tersetorch.bench.reproduce import squeeze_design
from tersetorch.bench.reproduce.runs import How


def images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 32, 32, generator=generator), torch.randint(10, (count,), generator=generator)


def test_a_row_is_whole(monkeypatch, tmp_path):
    monkeypatch.setattr(squeeze_design, "TIMED_SECONDS", 0.01)
    parts = squeeze_design.Images(images(128, 0), images(20, 1), images(20, 2))
    monkeypatch.setattr(squeeze_design, "cifar10", lambda seed, count: parts)
    record = squeeze_design.run(How([0], quick=True))
    json.dumps(record)
    (row,) = record["seeds"]
    points = row["points"]
    settings = {sweep: [point["setting"] for point in each] for sweep, each in points.items()}
    assert settings == record["plan"]["settings"]
    # The base is one network, in every sweep.
    bases = [points["squeeze ratio"][2], points["3x3 share"][2], points["pooling"][2], points["bypass"][0]]
    assert all(base.items() >= {"test": row["base"], "ms": bases[0]["ms"]}.items() for base in bases)
    assert all(0 <= point["held_out"] <= 100 and point["ms"] > 0 for each in points.values() for point in each)
    # More squeezed channels and more taps are more weights; later pooling is more work on the same ones.
    for sweep in ("squeeze ratio", "3x3 share"):
        for key in ("parameters", "macs", "bytes"):
            assert [point[key] for point in points[sweep]] == sorted({point[key] for point in points[sweep]})
    assert len({point["parameters"] for point in points["pooling"]}) == 1
    assert [point["macs"] for point in points["pooling"]] == sorted({point["macs"] for point in points["pooling"]})
    plain, simple, complicated = (point["parameters"] for point in points["bypass"])
    assert plain == simple < complicated
    assert len(squeeze_design.table(record).rows) == sum(map(len, settings.values()))
    squeeze_design.draw(record, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000


@pytest.mark.parametrize("choice", [{}, {"bypass": "complex"}, {"pct_3x3": 0.0}])
def test_what_is_measured_computes_what_was_trained(choice):
    model = squeeze_design._with_norms(squeeze_design._network(0, choice))
    x = images(64, 3)[0]
    model(x)  # moves the statistics
    model.eval()
    with torch.no_grad():
        trained = model(x)
        folded = squeeze_design._fold(model)(x)
    torch.testing.assert_close(folded, trained, atol=1e-4, rtol=1e-4)
    plain = squeeze_design._network(0, choice)
    assert [(n, t.shape) for n, t in model.state_dict().items()] == [
        (n, t.shape) for n, t in plain.state_dict().items()
    ]
