import pytest
import torch
from torch.nn import functional

from tersetorch.bench.cases import CASES, Conv, Linear, row_variation, weight_of


def test_patterns_have_the_density_and_the_variation_they_name():
    case = Linear("layer", 512, 2048)
    for density in (0.03, 0.35):
        plain, trained = (weight_of(case, density, pattern) for pattern in ("random", "trained"))
        for weight in (plain, trained):
            assert weight.shape == (512, 2048)
            assert (weight != 0).float().mean().item() == pytest.approx(density, rel=0.1)
        assert row_variation(plain) < 0.15
        assert row_variation(trained) == pytest.approx(0.3, abs=0.07)
        assert torch.equal(trained, weight_of(case, density, "trained"))
    assert row_variation(trained.T) == pytest.approx(0.3, abs=0.07)


def test_one_weight_serves_every_format():
    weight = weight_of(CASES["squeezenet fire9 expand"], 0.2, "random")
    assert weight.shape == (256, 64, 3, 3)
    assert torch.equal(weight, weight.bfloat16().float())
    assert 2 < weight.unique().numel() <= 32


def test_sizes_and_multiplies_are_those_of_torch():
    for case in (
        Conv("c", 6, 4, 3, 9, stride=2, groups=2),
        Conv("c", 5, 3, 5, 11, padded=False),
        Conv("c", 2, 3, 1, 4),
    ):
        weight = weight_of(case, 0.5, "random")
        y = case.reference(case.samples(2), weight)
        assert y.dtype == torch.float64
        assert y.shape == (2, case.out_channels, case.out_size, case.out_size)
        assert case.multiplies(2, 1.0) == y.numel() * weight[0].numel()
    linear = Linear("l", 3, 5)
    x, weight = linear.samples(2), weight_of(linear, 0.5, "random")
    torch.testing.assert_close(linear.reference(x, weight), functional.linear(x.double(), weight.double()))
    assert linear.multiplies(2, 0.5) == 15
