import copy
import re

import pytest
import torch
from rich.progress import Progress
from torch import nn
from torch.nn import functional

from tersetorch.methods import prune, quantize
from tersetorch.methods.prune import diagonal_hessian


def true_diagonal(model, name, loss):
    parameters = dict(model.named_parameters())
    weight = parameters[name].detach()
    hessian = torch.func.hessian(
        lambda w: loss(lambda *x: torch.func.functional_call(model, parameters | {name: w}, x))
    )
    return hessian(weight).reshape(weight.numel(), -1).diagonal().reshape(weight.shape).detach()


def patterns(number=12, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 20, generator=generator, dtype=dtype)
    return x, torch.randint(0, 5, (number,), generator=generator)


LOSSES = {
    "cross_entropy": lambda labels: labels,
    "weighted": lambda labels: labels,
    "ignoring": lambda labels: labels.where(torch.arange(len(labels)) % 3 > 0, -100),
    "mse": lambda labels: functional.one_hot(labels, 5).double(),
    "sse": lambda labels: functional.one_hot(labels, 5).double(),
    "bce_with_logits": lambda labels: functional.one_hot(labels, 5).double(),
    "callable": lambda labels: labels,
    "sum": lambda labels: labels,
}
BUILT = {
    "weighted": nn.CrossEntropyLoss(torch.tensor([1.0, 2, 3, 4, 5]).double()),
    "ignoring": nn.CrossEntropyLoss(label_smoothing=0.2),
    "callable": lambda y, t: functional.cross_entropy(y, t),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
}


@pytest.mark.parametrize("form", ["exact", "levenberg_marquardt"])
@pytest.mark.parametrize("loss", LOSSES)
def test_batches_do_not_change_the_result(make_mlp, loss, form):
    model = make_mlp().double()
    model[1] = nn.Tanh()
    x, labels = patterns(dtype=torch.float64)
    target = LOSSES[loss](labels)
    whole = diagonal_hessian(model, [(x, target)], BUILT.get(loss, loss), form=form)
    for sizes in ([1] * 12, [5, 7], [11, 1], [4, 0, 8]):
        batches = zip(x.split(sizes), target.split(sizes), strict=True)
        again = diagonal_hessian(model, batches, BUILT.get(loss, loss), form=form)
        for name, second in whole.items():
            assert torch.allclose(again[name], second, rtol=1e-12)
    if loss in ("cross_entropy", "sum", "callable"):
        true = true_diagonal(model, "2.weight", lambda run: functional.cross_entropy(run(x), labels))
        assert torch.allclose(whole["2"], true, rtol=1e-9)
    if loss == "sse":
        true = true_diagonal(model, "2.weight", lambda run: (run(x) - target).square().sum(1).mean())
        assert torch.allclose(whole["2"], true, rtol=1e-9)
    if loss in ("weighted", "ignoring"):
        true = true_diagonal(model, "2.weight", lambda run: BUILT[loss](run(x), target))
        assert torch.allclose(whole["2"], true, rtol=1e-6)


def test_nll_over_log_softmax_is_cross_entropy_in_both_forms(make_mlp):
    model = make_mlp().double()
    x, labels = patterns(dtype=torch.float64)
    for form in ("exact", "levenberg_marquardt"):
        want = diagonal_hessian(model, [(x, labels)], "cross_entropy", form=form)
        other = nn.Sequential(*model, nn.LogSoftmax(1))
        got = diagonal_hessian(other, [(x, labels)], nn.NLLLoss(), form=form)
        for name, second in want.items():
            assert torch.allclose(got[name], second, rtol=1e-9)


def test_the_forms_agree_where_functions_are_piecewise_linear(mlp):
    exact, levenberg = (
        diagonal_hessian(mlp, [patterns()], "cross_entropy", form=form) for form in ("exact", "levenberg_marquardt")
    )
    for name, second in exact.items():
        assert torch.allclose(levenberg[name], second, rtol=1e-6)
        assert second.shape == mlp.get_submodule(name).weight.shape
        assert second.dtype == torch.float32
        assert not second.requires_grad


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(20, 5), nn.Linear(20, 5)

    def forward(self, left, right):
        return self.left(left) + self.right(right)


def test_batches_come_as_tuples_lists_and_mappings():
    torch.manual_seed(0)
    model = Two()
    (left, target), (right, _) = patterns(), patterns(seed=1)
    want = diagonal_hessian(model, [(left, right, target)], "cross_entropy")
    for batch in ([left, right, target], {"right": right, "target": target, "left": left}):
        got = diagonal_hessian(model, iter([batch]), "cross_entropy")
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_tied_weight_sums_over_its_uses(tied):
    tied = tied.double()
    tokens = torch.randint(0, 12, (3, 4))
    target = torch.randn(3, 4, 12, dtype=torch.float64)
    got = diagonal_hessian(tied, [(tokens, target)], "mse", form="exact", targets=nn.Embedding)["embedding"]
    apart = copy.deepcopy(tied)
    apart.embedding.weight, apart.head.weight, apart.twin.weight = (
        nn.Parameter(tied.embedding.weight.detach().clone()) for _ in range(3)
    )
    each = diagonal_hessian(apart, [(tokens, target)], "mse", form="exact", targets=["embedding", "head", "twin"])
    assert torch.allclose(got, sum(each.values()), rtol=1e-12)


@pytest.mark.parametrize("attach", ["pruned", "shared"])
def test_a_compressed_weight_gives_what_its_plain_copy_does(mlp, attach):
    prune.magnitude(mlp, 0.6)
    if attach == "shared":
        quantize.kmeans(mlp, bits=3)
    from tersetorch.methods import finalize

    plain = finalize(copy.deepcopy(mlp))
    got = diagonal_hessian(mlp, [patterns()], "cross_entropy", form="exact")
    want = diagonal_hessian(plain, [patterns()], "cross_entropy", form="exact")
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert bool((got["0"][mlp[0].weight == 0] > 0).any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_are_computed_in_float32(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 5))
    model = model.to(dtype).eval()
    x, labels = torch.randn(6, 1, 6, 6).to(dtype), torch.randint(0, 5, (6,))
    # Tiny second derivatives, which float16 would lose.
    model[4].weight.data *= 1e-4
    got = diagonal_hessian(model, [(x, labels)], "cross_entropy", form="exact")
    want = diagonal_hessian(copy.deepcopy(model).float(), [(x.float(), labels)], "cross_entropy", form="exact")
    for name, second in want.items():
        assert got[name].dtype == torch.float32
        assert torch.allclose(got[name], second, rtol=0.02, atol=0)
        assert 0 < float(second[second > 0].min()) < 1e-7 or name == "4"


def test_the_model_and_the_generator_are_left_as_they_were():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 5))
    model[1].eval()
    model[3].weight.requires_grad_(False)
    x, labels = patterns()
    model(x).sum().backward()
    state = copy.deepcopy(model.state_dict())
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), batch_size=5, shuffle=True)
    drawn = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first = diagonal_hessian(model, loader, "cross_entropy")
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [module.training for module in model] == [True, False, True, True]
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, True, False, True]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for before, parameter in zip(gradients, model.parameters(), strict=True):
        assert before is None or torch.equal(before, parameter.grad)
    assert not model._forward_hooks and not model[0]._forward_pre_hooks
    again = diagonal_hessian(model.eval(), [(x, labels)], "cross_entropy")
    for name, second in first.items():
        assert torch.allclose(again[name], second, rtol=1e-5)


def test_a_failure_leaves_the_model_as_it_was(mlp):
    mlp.append(nn.Linear(5, 2))
    mlp[3].forward = lambda x: 1 / 0
    mlp[0].weight.requires_grad_(False)
    with pytest.raises(ZeroDivisionError):
        diagonal_hessian(mlp, [patterns()], "cross_entropy", targets="2")
    assert mlp.training and not mlp[0].weight.requires_grad and mlp[2].weight.requires_grad
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_progress_counts_batches(mlp):
    with Progress(disable=True) as progress:
        x, labels = patterns()
        diagonal_hessian(mlp, list(zip(x.split(5), labels.split(5), strict=True)), "cross_entropy", progress=progress)
    (task,) = progress.tasks
    assert (task.completed, task.total) == (3, 3)


def test_a_compiled_model_is_followed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 5))
    compiled = torch.compile(model, backend="eager")
    got = diagonal_hessian(compiled, [patterns()], "cross_entropy")
    (want,) = diagonal_hessian(model, [patterns()], "cross_entropy").values()
    assert torch.equal(got["_orig_mod.0"], want)


class Expert(nn.Module):
    """Which layer runs depends on the data; one never does."""

    def __init__(self):
        super().__init__()
        self.low, self.high, self.never = nn.Linear(20, 5), nn.Linear(20, 5), nn.Linear(20, 5)

    def forward(self, x):
        return self.high(x) if x.sum() > 0 else self.low(x)


def test_a_weight_that_takes_no_part_is_refused_and_one_that_sometimes_does_is_not():
    torch.manual_seed(0)
    model = Expert()
    x, labels = patterns()
    data = [(x.abs(), labels), (-x.abs(), labels)]
    message = "every selected weight must take part in the loss, got 'never', .*; pass ignore=\\['never'\\]"
    with pytest.raises(ValueError, match=f"prune.diagonal_hessian: {message}"):
        diagonal_hessian(model, data, "cross_entropy")
    both = diagonal_hessian(model, data, "cross_entropy", ignore="never")
    one = diagonal_hessian(model, data[:1], "cross_entropy", targets="high")
    assert torch.allclose(both["high"], one["high"] / 2)
    with pytest.raises(ValueError, match="got 'low', 'never'"):
        diagonal_hessian(model, data[:1], "cross_entropy")


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "data must hold at least one pattern, got none"),
        ([(torch.zeros(0, 20), torch.zeros(0, dtype=torch.int64))], ValueError, "data must hold at least one pattern"),
        (torch.zeros(3, 20), TypeError, "data must be an iterable of batches, got Tensor"),
        ({"x": 1}, TypeError, "data must be an iterable of batches, got dict"),
        (3, TypeError, "data must be an iterable of batches, got int"),
        ([torch.zeros(3, 20)], TypeError, "a batch must be (inputs..., target) or a mapping with the key 'target'"),
        ([(torch.zeros(3, 20),)], TypeError, "a batch must be (inputs..., target)"),
        ([{"input": torch.zeros(3, 20)}], TypeError, "a batch must be (inputs..., target) or a mapping"),
        ([(torch.zeros(3, 20), [1, 2, 3])], TypeError, "the target a tensor, got tuple"),
        ([(torch.zeros(3, 20), torch.zeros(2, dtype=torch.int64))], ValueError, "the target must fit the model's outp"),
        ([(torch.full((3, 20), torch.nan), torch.zeros(3, dtype=torch.int64))], ValueError, "must be finite, got NaN"),
    ],
)
def test_bad_data_is_refused(mlp, data, error, message):
    with pytest.raises(error, match=re.escape("prune.diagonal_hessian: ") + ".*" + re.escape(message)):
        diagonal_hessian(mlp, data, "cross_entropy")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loss": "hinge"}, ValueError, "loss must be one of"),
        ({"form": "diagonal"}, ValueError, "form must be one of levenberg_marquardt, exact, got 'diagonal'"),
        ({"targets": "fc"}, ValueError, "targets must match"),
    ],
)
def test_bad_arguments_are_refused(mlp, arguments, error, message):
    with pytest.raises(error, match=f"prune.diagonal_hessian: {message}"):
        diagonal_hessian(mlp, **{"data": [patterns()], "loss": "mse", **arguments})


def test_a_model_must_give_one_tensor(mlp):
    mlp.forward = lambda x: (nn.Sequential.forward(mlp, x),)
    with pytest.raises(TypeError, match=r"model must give one tensor of numbers, patterns first, got tuple; wrap it"):
        diagonal_hessian(mlp, [patterns()], "cross_entropy")
