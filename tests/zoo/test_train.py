import pytest
import torch
from rich.progress import Progress
from torch import nn
from torch.nn import functional

from tersetorch.zoo import error_rate, fit, steps_per_epoch


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(50, 4, generator=generator)
    return images, (images @ torch.randn(4, 3, generator=generator)).argmax(1)


def network(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_one_step_is_the_gradient_step(problem):
    images, labels = problem
    model, reference = network(), network()
    fit(model, images, labels, epochs=1, batch_size=50, lr=0.5, momentum=0.0, weight_decay=0.1, schedule="constant")
    functional.cross_entropy(reference(images), labels).backward()
    for parameter, start in zip(model.parameters(), reference.parameters(), strict=True):
        decay = 0.1 * start.detach() if start.ndim > 1 else 0
        torch.testing.assert_close(parameter.detach(), start.detach() - 0.5 * (start.grad + decay))


def test_the_l1_penalty_is_part_of_the_loss(problem):
    images, labels = problem
    model, reference = network(), network()
    fit(model, images, labels, epochs=1, batch_size=50, lr=0.5, momentum=0.0, l1_penalty=0.1, schedule="constant")
    penalty = sum(parameter.abs().sum() for parameter in reference.parameters() if parameter.ndim > 1)
    (functional.cross_entropy(reference(images), labels) + 0.1 * penalty).backward()
    for parameter, start in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach(), start.detach() - 0.5 * start.grad)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_learns(problem, optimizer):
    images, labels = problem
    model = network()
    before = error_rate(model, images, labels)
    fit(model, images, labels, epochs=60, batch_size=10, lr=0.05, optimizer=optimizer)
    assert error_rate(model, images, labels) < min(before, 0.05)


def test_the_seed_decides_and_the_global_generator_is_left_alone(problem):
    def trained(seed):
        return weights(fit(network(dropout=0.3), *problem, epochs=2, batch_size=7, seed=seed))

    first = trained(3)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    model = network(dropout=0.3)
    torch.set_rng_state(state)
    fit(model, *problem, epochs=2, batch_size=7, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weights(model), first)
    assert not torch.equal(trained(4), first)


@pytest.mark.parametrize(
    ("images", "batch", "steps"), [(50, 10, 5), (50, 49, 1), (50, 51, 1), (50, 16, 3), (1, 128, 1)]
)
def test_steps_and_after_step(images, batch, steps):
    calls = []
    x, y = torch.randn(images, 4), torch.zeros(images, dtype=torch.int64)
    assert steps_per_epoch(images, batch) == steps
    fit(network(), x, y, epochs=3, batch_size=batch, lr=0.01, after_step=lambda: calls.append(1))
    assert len(calls) == 3 * steps


def test_cosine_falls_to_zero(problem):
    # With the rate at 0.5 * (1 + cos(pi * step / steps)), ten steps move less than ten constant ones.
    constant, cosine = (
        fit(network(), *problem, epochs=10, batch_size=50, lr=1e-3, momentum=0.0, schedule=schedule)
        for schedule in ("constant", "cosine")
    )
    moved = [(weights(model) - weights(network())).norm() for model in (constant, cosine)]
    assert 0.5 < moved[1] / moved[0] < 0.6


def test_input_dropout_zeroes_and_scales(problem):
    seen = []

    class Eye(nn.Linear):
        def forward(self, x):
            seen.append(x)
            return super().forward(x)

    images = torch.ones(2000, 4)
    fit(Eye(4, 2), images, torch.zeros(2000, dtype=torch.int64), epochs=1, batch_size=2000, input_dropout=0.2)
    assert set(seen[0].unique().tolist()) == {0.0, 1.25}
    assert 0.17 < (seen[0] == 0).float().mean() < 0.23


def test_frozen_tensors_stay_and_mode_is_restored(problem):
    model = network().eval()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    fit(model, *problem, epochs=2, weight_decay=0.1)
    assert torch.equal(model[0].weight, before)
    assert not model.training


def test_no_epochs_change_nothing(problem):
    model = network()
    assert fit(model, *problem, epochs=0) is model
    assert torch.equal(weights(model), weights(network()))


def test_progress_has_one_bar_that_fills(problem):
    with Progress(disable=True) as progress:
        fit(network(), *problem, epochs=2, batch_size=10, progress=progress, description="words")
    assert [(task.description, task.total, task.completed) for task in progress.tasks] == [("words", 10, 10)]


def test_a_loss_that_explodes_is_said(problem):
    model = network()
    with pytest.raises(ValueError, match=r"fit: the loss must stay finite, got .* lower lr=1e"):
        fit(model, *problem, epochs=20, lr=1e30)
    assert model.training


def test_error_rate_counts_and_restores_the_mode():
    model = nn.Sequential(nn.Dropout(0.9), nn.Identity()).train()
    images = torch.eye(3).repeat(1000, 1)
    labels = torch.arange(3).repeat(1000)
    labels[:6] = 1
    assert error_rate(model, images, labels) == 4 / 3000
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"epochs": -1}, ValueError, "epochs must be at least 0, got -1"),
        ({"epochs": 1.5}, TypeError, "epochs must be an int, got 1.5"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"lr": -0.1}, ValueError, r"lr must be in \[0, inf\), got -0.1"),
        ({"lr": float("nan")}, ValueError, r"lr must be in \[0, inf\), got nan"),
        ({"lr": "0.1"}, TypeError, "lr must be a number, got '0.1'"),
        ({"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\), got 1.0"),
        ({"l1_penalty": -1}, ValueError, r"l1_penalty must be in \[0, 1\), got -1"),
        ({"weight_decay": -1}, ValueError, r"weight_decay must be in \[0, 1\), got -1"),
        ({"input_dropout": 1}, ValueError, r"input_dropout must be in \[0, 1\), got 1"),
        ({"optimizer": "lion"}, ValueError, "optimizer must be one of sgd, adam, got 'lion'"),
        ({"schedule": "step"}, ValueError, "schedule must be one of cosine, constant, got 'step'"),
        ({"seed": 2**63}, ValueError, r"seed must be below 2\*\*63"),
        ({"labels": torch.zeros(50)}, ValueError, "labels must be int64"),
        ({"labels": torch.zeros(49, dtype=torch.int64)}, ValueError, "images must be as many as labels"),
        ({"images": [1.0]}, TypeError, "images must be a tensor, got list"),
        ({"images": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}, ValueError, "at least one"),
        ({"model": "net"}, TypeError, "model must be a torch.nn.Module, got str"),
        ({"model": nn.ReLU()}, ValueError, "model must have a parameter that requires gradients, got none"),
    ],
)
def test_bad_arguments_are_refused(problem, arguments, error, sentence):
    everything = {"model": network(), "images": problem[0], "labels": problem[1], "epochs": 1} | arguments
    with pytest.raises(error, match=sentence):
        fit(everything.pop("model"), everything.pop("images"), everything.pop("labels"), **everything)


def test_error_rate_refuses_bad_arguments(problem):
    with pytest.raises(ValueError, match="error_rate: images must be as many as labels"):
        error_rate(network(), problem[0][:2], problem[1])
