"""Signs, their gradients, and powers of two."""

import pytest
import torch

from tersetorch.methods.binarize import Sign, ap2, sign


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sign_is_the_step_and_passes_gradients_inside_one(dtype):
    x = torch.tensor([-2.0, -1.0, -0.5, -0.0, 0.0, 0.3, 1.0, 1.5], dtype=dtype, requires_grad=True)
    y = sign(x)
    assert y.dtype == dtype and y.tolist() == [-1, -1, -1, 1, 1, 1, 1, 1]
    y.backward(torch.arange(1, 9, dtype=dtype))
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 6, 7, 0]
    assert sign(torch.tensor(float("nan"))) == -1


@pytest.mark.parametrize("stochastic", [False, True])
def test_signs_keep_the_layout_and_take_any_number(stochastic):
    x = torch.randn(2, 5, 3, 4).to(memory_format=torch.channels_last)
    y = sign(x, stochastic)
    assert y.stride() == x.stride() and set(y.unique().tolist()) == {-1.0, 1.0}
    edges = torch.tensor([float("inf"), -float("inf"), float("nan"), 2.0, -2.0])
    assert sign(edges, stochastic).tolist() == [1, -1, -1, 1, -1]
    assert sign(torch.empty(0, 3), stochastic).shape == (0, 3)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # for gradients within vmap
def test_signs_are_mapped():
    torch.manual_seed(0)
    x, upstream = 2 * torch.randn(3, 4, 2), torch.randn(3, 4)
    mapped = torch.func.vmap(sign, in_dims=2, out_dims=2)
    assert torch.equal(mapped(x), sign(x))
    assert torch.equal(torch.func.vmap(mapped)(x[None].repeat(2, 1, 1, 1)), sign(x).repeat(2, 1, 1, 1))
    gradients = torch.func.vmap(torch.func.grad(lambda one: (sign(one) * upstream).sum()), in_dims=2, out_dims=2)(x)
    assert torch.equal(gradients, upstream[..., None] * (x.abs() <= 1))
    zeros = torch.zeros(2, 1000)
    drawn = torch.func.vmap(lambda one: sign(one, True), randomness="different")(zeros)
    assert set(drawn.unique().tolist()) == {-1.0, 1.0} and not torch.equal(drawn[0], drawn[1])
    for randomness in ("error", "same"):
        with pytest.raises(ValueError, match="sign: randomness must be 'different'"):
            torch.func.vmap(lambda one: sign(one, True), randomness=randomness)(zeros)


def test_refuses_what_is_no_floating_point_tensor():
    for function in (sign, ap2):
        for x, kind in (([1.0], "list"), (torch.arange(3), r"torch\.int64")):
            with pytest.raises(TypeError, match=f"{function.__name__}: x must be a floating-point tensor, got {kind}"):
                function(x)
    with pytest.raises(TypeError, match="sign: stochastic must be True or False"):
        sign(torch.zeros(1), stochastic=1)


def test_stochastic_signs_are_plus_one_with_their_probability():
    torch.manual_seed(0)
    for x, probability in ((-1.5, 0), (-0.5, 0.25), (0.2, 0.6), (1.0, 1)):
        drawn = sign(torch.full((20000,), x), stochastic=True)
        assert set(drawn.tolist()) <= {-1.0, 1.0}
        assert (drawn == 1).float().mean().item() == pytest.approx(probability, abs=0.015)


def test_the_module_draws_in_training_only():
    torch.manual_seed(0)
    x = torch.full((1000,), 0.1)
    module = Sign(stochastic=True)
    assert len(module(x).unique()) == 2
    assert torch.equal(module.eval()(x), torch.ones(1000))
    assert torch.equal(Sign()(x), torch.ones(1000))
    with pytest.raises(TypeError, match="stochastic must be True or False"):
        Sign(stochastic=1)


def test_ap2_is_the_next_power_of_two():
    x = torch.tensor([0.0, 1.0, 1.4, 1.42, 3.0, -0.3, -6.0, 2.0**-30], requires_grad=True)
    y = ap2(x)
    assert y.tolist() == [0, 1, 1, 2, 4, -0.25, -8, 2.0**-30]
    y.sum().backward()
    assert x.grad.tolist() == [1] * 8
