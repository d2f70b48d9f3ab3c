"""Batch normalisation and AdaMax by shifts, against their formulas."""

import pytest
import torch

from tersetorch.methods.binarize import ShiftAdaMax, ShiftBatchNorm1d, ShiftBatchNorm2d, ap2


def test_batch_norm_is_the_formula_in_training_and_evaluation():
    torch.manual_seed(0)
    x = torch.randn(50, 3) * torch.tensor([1.0, 3.0, 0.2]) + torch.tensor([0.0, 5.0, -1.0])
    norm = ShiftBatchNorm1d(3, momentum=0.25)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.3, 0.6, -3.0]))
        norm.bias.copy_(torch.tensor([0.0, 1.0, 2.0]))
    centred = x - x.mean(0)
    var = (centred * ap2(centred)).mean(0)
    want = ap2(norm.weight) * centred * ap2((var + norm.eps).rsqrt()) + norm.bias
    assert torch.allclose(norm(x), want, atol=1e-6)
    assert torch.allclose(norm.running_mean, 0.25 * x.mean(0)) and torch.allclose(norm.running_var, 0.75 + 0.25 * var)
    centred = x - norm.running_mean
    want = ap2(norm.weight) * centred * ap2((norm.running_var + norm.eps).rsqrt()) + norm.bias
    assert torch.allclose(norm.eval()(x), want, atol=1e-6)
    # Within the factor sqrt(2) of each of its two powers of two of an ordinary batch norm.
    plain = torch.nn.functional.batch_norm(x, None, None, training=True)
    ratio = ShiftBatchNorm1d(3)(x).std(0) / plain.std(0)
    assert ((ratio > 0.5) & (ratio < 2)).all()


def test_batch_norm_of_images_has_gradients_and_the_usual_state():
    norm = ShiftBatchNorm2d(4)
    assert list(norm.state_dict()) == list(torch.nn.BatchNorm2d(4).state_dict())
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    norm(x).square().sum().backward()
    assert x.grad.isfinite().all() and norm.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="input must be 4-D, got 2-D"):
        norm(torch.randn(2, 4))
    with pytest.raises(ValueError, match="input must be 2-D or 3-D, got 4-D"):
        ShiftBatchNorm1d(4)(x)


def test_batch_norm_refuses_other_channels_and_too_few_values():
    for norm, shape, message in (
        (ShiftBatchNorm1d(5), (3, 1), "input must have 5 channels"),
        (ShiftBatchNorm1d(5).eval(), (3, 1), "input must have 5 channels"),
        (ShiftBatchNorm2d(1), (3, 2, 4, 4), "input must have 1 channels"),
        (ShiftBatchNorm1d(5), (0, 5), "at least two values a channel"),
        (ShiftBatchNorm1d(5), (1, 5), "at least two values a channel"),
        (ShiftBatchNorm2d(5), (1, 5, 1, 1), "at least two values a channel"),
        (ShiftBatchNorm1d(5, track_running_stats=False).eval(), (0, 5), "at least two values a channel"),
    ):
        state = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            norm(torch.ones(shape))
        assert all(torch.equal(tensor, state[name]) for name, tensor in norm.state_dict().items())
    assert ShiftBatchNorm1d(5).eval()(torch.ones(0, 5)).shape == (0, 5)
    assert ShiftBatchNorm1d(5)(torch.ones(1, 5, 2)).shape == (1, 5, 2)


def test_adamax_is_the_formula_and_resumes():
    def start():
        return torch.nn.Parameter(torch.tensor([0.5, -0.25, 0.0]))

    gradients = [torch.tensor([0.3, -2.0, 0.0]), torch.tensor([-0.1, 1.0, 0.5]), torch.tensor([0.02, 0.0, -4.0])]
    parameter = start()
    optimizer = ShiftAdaMax([parameter], lr=2**-4)
    theta, mean, largest = parameter.detach().clone(), torch.zeros(3), torch.zeros(3)
    saved = None
    for t, gradient in enumerate(gradients, 1):
        parameter.grad = gradient.clone()
        optimizer.step()
        mean = mean + (gradient - mean) / 8
        largest = ap2(torch.maximum((1 - 2**-10) * largest, gradient.abs()).clamp(min=2**-27))
        theta = theta - ap2(torch.tensor(2**-4 / (1 - 0.875**t))) * mean / largest
        assert torch.allclose(parameter, theta, atol=1e-7)
        if t == 2:
            saved = {"parameter": parameter.detach().clone(), "optimizer": optimizer.state_dict()}
            saved = torch.load(_written(saved), weights_only=True)
    other = torch.nn.Parameter(saved["parameter"])
    resumed = ShiftAdaMax([other], lr=2**-4)
    resumed.load_state_dict(saved["optimizer"])
    other.grad = gradients[2].clone()
    resumed.step()
    assert torch.equal(other, parameter)


def _written(content):
    import io

    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    return buffer


def test_adamax_refuses():
    parameter = torch.nn.Parameter(torch.zeros(1))
    for options, name in (({"lr": -1.0}, "lr"), ({"betas": (1.0, 0.5)}, r"betas\[0\]"), ({"eps": float("nan")}, "eps")):
        with pytest.raises(ValueError, match=name):
            ShiftAdaMax([parameter], **options)
    for betas in ((0.9,), (0.9, 0.9, 0.9), 0.9):
        with pytest.raises(ValueError, match="betas must be two numbers, got"):
            ShiftAdaMax([parameter], betas=betas)
