import pytest
import torch
from torch import nn
from torch.nn import functional

from tersetorch.methods.prune.output_losses import at_output, check_loss


def outputs(*shape):
    torch.manual_seed(0)
    return torch.randn(*shape, dtype=torch.float64)


def classes(*shape, upper=4):
    return torch.randint(0, upper, shape, generator=torch.Generator().manual_seed(1))


def reals(*shape):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.25], dtype=torch.float64)
CASES = {
    "mse": (nn.MSELoss, {}, outputs(5, 3), reals(5, 3)),
    "cross entropy": (nn.CrossEntropyLoss, {}, outputs(5, 4), classes(5)),
    "cross entropy of maps": (nn.CrossEntropyLoss, {}, outputs(5, 4, 2, 3), classes(5, 2, 3)),
    "weights": (nn.CrossEntropyLoss, {"weight": WEIGHT}, outputs(5, 4), classes(5)),
    "smoothing": (nn.CrossEntropyLoss, {"label_smoothing": 0.3}, outputs(5, 4), classes(5)),
    "all at once": (
        nn.CrossEntropyLoss,
        {"weight": WEIGHT, "label_smoothing": 0.3, "ignore_index": 2},
        outputs(7, 4, 3),
        classes(7, 3),
    ),
    "soft targets": (
        nn.CrossEntropyLoss,
        {"weight": WEIGHT, "label_smoothing": 0.1},
        outputs(5, 4, 2),
        reals(5, 4, 2).softmax(1),
    ),
    "nll": (nn.NLLLoss, {}, outputs(5, 4).log_softmax(1), classes(5)),
    "weighted nll": (nn.NLLLoss, {"weight": WEIGHT, "ignore_index": 1}, outputs(5, 4, 2), classes(5, 2)),
    "bce": (nn.BCEWithLogitsLoss, {}, outputs(5, 3), reals(5, 3)),
    "weighted bce": (
        nn.BCEWithLogitsLoss,
        {"weight": reals(3), "pos_weight": 1 + reals(3)},
        outputs(5, 3),
        reals(5, 3).round(),
    ),
    "any other": (nn.SmoothL1Loss, {"beta": 0.5}, outputs(5, 3), reals(5, 3)),
    "not convex": (nn.PoissonNLLLoss, {"log_input": False}, 2 + reals(5, 3), reals(5, 3)),
    "linear": (nn.L1Loss, {}, outputs(5, 3), reals(5, 3)),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", CASES)
def test_value_gradient_and_second_derivatives_are_those_of_autograd(case, reduction):
    kind, options, output, target = CASES[case]
    loss = kind(reduction=reduction, **options).double()
    found = at_output("test", loss, output, target)
    patterns = 1 if reduction == "mean" else len(output)
    scale = 1 / found.weight * patterns
    value, gradient = torch.func.grad_and_value(lambda y: loss(y, target))(output)[::-1]
    second = torch.func.hessian(lambda y: loss(y, target))(output).reshape(output.numel(), -1).diagonal()
    assert found.total * scale == pytest.approx(float(value), rel=1e-6)
    assert torch.allclose(found.gradient * scale, gradient, rtol=1e-9)
    assert torch.allclose(found.second * scale, second.view_as(output), rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "function", "output", "target"),
    [
        ("mse", functional.mse_loss, outputs(5, 3), reals(5, 3)),
        ("cross_entropy", functional.cross_entropy, outputs(5, 4), classes(5)),
        ("nll", functional.nll_loss, outputs(5, 4), classes(5)),
        ("bce_with_logits", functional.binary_cross_entropy_with_logits, outputs(5, 3), reals(5, 3)),
    ],
)
def test_names_functions_and_callables_agree(name, function, output, target):
    named, known, called = (
        at_output("test", loss, output, target) for loss in (name, function, lambda y, t: function(y, t))
    )
    assert named.total == known.total
    assert named.total / named.weight == pytest.approx(called.total / called.weight)
    assert torch.allclose(named.second / named.weight, called.second / called.weight, rtol=1e-9)
    assert torch.allclose(named.gradient / named.weight, called.gradient / called.weight, rtol=1e-9)


def test_sse_is_the_papers_sum_over_outputs():
    output, target = outputs(5, 3), reals(5, 3)
    found = at_output("test", "sse", output, target)
    assert found.weight == 5
    assert found.total == pytest.approx(float((output - target).square().sum()))
    assert torch.equal(found.second, torch.full_like(output, 2))


def test_classes_may_come_last():
    output, target = outputs(2, 5, 4), classes(2, 5)
    last = at_output("test", "cross_entropy", output, target)
    second = at_output("test", "cross_entropy", output.movedim(-1, 1), target)
    assert last.total == second.total
    assert torch.equal(last.second, second.second.movedim(1, -1))
    assert torch.equal(last.gradient, second.gradient.movedim(1, -1))


def test_a_pattern_without_a_target_counts_for_nothing():
    output = outputs(3, 4)
    found = at_output("test", "cross_entropy", output, torch.tensor([1, -100, 2]))
    assert found.weight == 2
    assert not bool(found.second[1].any() or found.gradient[1].any())


@pytest.mark.parametrize(
    ("loss", "output", "target", "message"),
    [
        ("mse", outputs(5, 3), reals(5, 1), r"the target must fit .* got \(5, 1\) of torch.float64 beside \(5, 3\)"),
        ("cross_entropy", outputs(5, 4), classes(4), "the target must fit .*a class number is wanted"),
        ("cross_entropy", outputs(5, 4), classes(5) + 3, "the target must fit"),
        ("nll", outputs(5, 4), reals(5), "the target must fit"),
        ("bce_with_logits", outputs(5, 4), reals(5, 3), "the target must fit"),
        (lambda y, t: y - t, outputs(5, 3), reals(5, 3), r"loss must give one number .*, got \(5, 3\); return"),
        (lambda y, t: 1.0, outputs(5, 3), reals(5, 3), "loss must give one number .*, got float"),
        (lambda y, t: t.sum(), outputs(5, 3), reals(5, 3), "loss must give one number that depends on the output"),
    ],
)
def test_a_target_that_does_not_fit_is_refused(loss, output, target, message):
    with pytest.raises(ValueError, match=f"test: {message}"):
        at_output("test", loss, output, target)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        ("cross entropy", ValueError, "loss must be one of mse, sse, cross_entropy, .* got 'cross entropy'"),
        (3, TypeError, "loss must be a name, a loss module or a callable, got int"),
        (nn.MSELoss(reduction="none"), ValueError, "loss must have reduction 'mean' or 'sum', got 'none'"),
    ],
)
def test_what_is_no_loss_is_refused(loss, error, message):
    with pytest.raises(error, match=f"test: {message}"):
        check_loss("test", loss)
