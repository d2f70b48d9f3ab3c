import pytest
import torch
from torch import nn

from tersetorch.methods import prune


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2))


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 3, 8, 8, generator=generator) * 3 + 1 for _ in range(3)]


def test_statistics_are_the_average_over_the_batches(model, data):
    state = torch.get_rng_state()
    model[4].eval()
    assert prune.recalibrate_batch_norm(model, [(x, "label") for x in data]) is model
    inner = [model[0](x).detach() for x in data]
    torch.testing.assert_close(model[1].running_mean, torch.stack([x.mean((0, 2, 3)) for x in inner]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([x.var((0, 2, 3)) for x in inner]).mean(0))
    # The second norm saw the first one's output by batch statistics, and no dropout.
    normal = [nn.functional.batch_norm(x, None, None, model[1].weight, model[1].bias, True) for x in inner]
    second = [model[3](x).detach() for x in normal]
    torch.testing.assert_close(model[4].running_mean, torch.stack([x.mean((0, 2, 3)) for x in second]).mean(0))
    assert model[1].momentum == 0.1 and model[0].training and not model[4].training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "data must hold at least one batch, got none"),
        ([torch.full((2, 3, 8, 8), torch.nan)], ValueError, "data must give finite statistics, got NaN or infinity"),
        (torch.ones(2, 3, 8, 8), TypeError, "data must be an iterable of batches, got Tensor; pass a list"),
        (3, TypeError, "data must be an iterable of batches, got int"),
        ([torch.ones(2, 3, 8, 8), torch.ones(2, 5, 8, 8)], RuntimeError, "channels"),
    ],
)
def test_what_fails_changes_nothing(model, data, error, message):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        prune.recalibrate_batch_norm(model, data)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[1].momentum == 0.1 and all(module.training for module in model.modules())


def test_models_without_statistics_and_norms_out_of_reach(data):
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    assert prune.recalibrate_batch_norm(plain, data) is plain

    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.spare.running_mean.fill_(5)

        def forward(self, x):
            return self.used(x)

    model = prune.recalibrate_batch_norm(Spare(), data)
    assert float(model.used.running_mean.mean()) != 0
    assert model.spare.running_mean.tolist() == [5, 5, 5]
