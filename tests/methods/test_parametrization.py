import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tersetorch.methods import finalize, prune, quantize
from tersetorch.methods.parametrization import CompressedWeight, is_live, live_weight, release_graphs


def compressed(module, tensor="weight"):
    return live_weight(module, tensor).compressed


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_weight_is_plain_zero_where_it_is_pruned():
    parametrization = CompressedWeight(torch.tensor([[True, False, False, True]]))
    weight = parametrization(torch.tensor([[1.0, -2.0, float("nan"), -4.0]]))
    assert weight.tolist() == [[1.0, 0.0, 0.0, -4.0]]
    assert not weight.signbit()[0, 1]


def test_a_codebook_entry_gets_the_sum_of_its_members_gradients(mlp):
    prune.magnitude(mlp, 0.5)
    quantize.kmeans(mlp, 3)
    dense = finalize(copy.deepcopy(mlp))
    x = torch.randn(16, 20, generator=torch.Generator().manual_seed(0))
    mlp(x).square().mean().backward()
    dense(x).square().mean().backward()
    for index in (0, 2):
        weight = compressed(mlp[index])
        expected = torch.zeros(weight.codebook.shape[1])
        for position in weight.mask.nonzero().tolist():
            expected[int(weight.codes[tuple(position)])] += dense[index].weight.grad[tuple(position)]
        torch.testing.assert_close(weight.codebook.grad[0], expected)
        assert weight.codebook.grad[0, 0] == 0
        assert live_weight(mlp[index], "weight").original.grad is None


def test_gradients_by_finite_differences():
    weight = CompressedWeight(torch.tensor([[True, False, True], [True, True, False]]))
    original = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(weight, original)
    weight.codes = torch.tensor([[1, 0, 2], [1, 1, 0]], dtype=torch.uint8)
    weight.codebook = nn.Parameter(torch.randn(1, 3, dtype=torch.float64))

    def of_codebook(codebook):
        return torch.func.functional_call(weight, {"codebook": codebook}, (original.detach(),))

    assert torch.autograd.gradcheck(of_codebook, weight.codebook)


def test_a_dense_gradient_reaches_pruned_positions_and_changes_no_value():
    weight = CompressedWeight(torch.tensor([[True, False, False, True]]))
    original = torch.tensor([[1.0, -2.0, float("nan"), -4.0]], requires_grad=True)
    weight.dense_gradient = True
    value = weight(original)
    assert value.tolist() == [[1.0, 0.0, 0.0, -4.0]] and not value.signbit()[0, 1]
    weight.mask.logical_not_()  # between the passes
    value.backward(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert original.grad.tolist() == [[1.0, 2.0, 3.0, 4.0]]
    assert torch.func.grad(lambda x: (weight(x) * 3).sum())(torch.ones(1, 4)).tolist() == [[3.0] * 4]
    assert torch.func.vmap(weight)(original.detach().expand(2, 1, 4)).shape == (2, 1, 4)


def test_shared_values_are_not_moved_by_pruned_positions_for_all_a_dense_gradient():
    weight = CompressedWeight(torch.tensor([[True, False, True]]))
    weight.codes = torch.tensor([[1, 0, 2]], dtype=torch.uint8)
    weight.codebook = nn.Parameter(torch.tensor([[0.0, 5.0, 6.0]]))
    weight.dense_gradient = True
    weight(torch.ones(1, 3)).sum().backward()
    assert weight.codebook.grad.tolist() == [[0.0, 1.0, 1.0]]


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.1, momentum=0.9),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
    "lbfgs": lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, max_iter=3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masks_and_zeros_survive_optimizer_steps(mlp, train, name):
    optimizer = OPTIMIZERS[name](mlp.parameters())
    train(mlp, optimizer)  # so that there is momentum towards the weights that go
    prune.magnitude(mlp, 0.7)
    mask = compressed(mlp[0]).mask.clone()
    before = mlp[0].weight.detach().clone()
    train(mlp, optimizer)
    assert torch.equal(mlp[0].weight == 0, ~mask)
    assert not torch.equal(mlp[0].weight, before)
    quantize.kmeans(mlp, 3)
    before = mlp[0].weight.detach().clone()
    train(mlp, optimizer)
    assert torch.equal(mlp[0].weight == 0, ~mask)
    assert len(mlp[0].weight.unique()) == 8
    assert not torch.equal(mlp[0].weight, before)
    finalize(mlp)
    assert torch.equal(mlp[0].weight == 0, ~mask)
    before = mlp[0].weight.detach().clone()
    train(mlp, optimizer)
    assert not torch.equal(mlp[0].weight, before)


def test_a_frozen_weight_stays_frozen(mlp):
    prune.magnitude(mlp, 0.5)
    mlp[0].parametrizations.weight.original.requires_grad_(False)
    with pytest.raises(ValueError, match="the weight of '0' must not be frozen"):
        quantize.kmeans(mlp, 3)
    quantize.kmeans(mlp, 3, targets="2")
    finalize(mlp)
    assert [mlp[index].weight.requires_grad for index in (0, 2)] == [False, True]


def test_a_frozen_codebook_stays_frozen(mlp):
    quantize.kmeans(mlp, 3)
    compressed(mlp[0]).codebook.requires_grad_(False)
    for method in (quantize.kmeans, prune.magnitude):
        with pytest.raises(ValueError, match="the weight of '0' must not be frozen"):
            method(mlp, *([0.5] if method is prune.magnitude else [2]))
    assert [compressed(mlp[index]).codebook.requires_grad for index in (0, 2)] == [False, True]
    finalize(mlp)
    assert [mlp[index].weight.requires_grad for index in (0, 2)] == [False, True]


@pytest.mark.parametrize("share", [False, True])
def test_state_round_trips_into_a_freshly_attached_model(make_mlp, train, share):
    source = make_mlp()
    prune.magnitude(source, 0.7)
    if share:
        quantize.kmeans(source, 3)
    train(source)
    for start in (
        lambda model: prune.magnitude(model, 0.0),
        lambda model: prune.magnitude(model, 0.9),
        lambda model: quantize.kmeans(model, 5),
        lambda model: quantize.kmeans(prune.magnitude(model, 0.9), 3),
    ):
        other = start(make_mlp(seed=1))
        other.load_state_dict(source.state_dict())
        assert same_state(state_of(other), state_of(source))
        x = torch.randn(4, 20)
        assert torch.equal(other(x), source(x))
        # It trains on in the same way too.
        one, two = copy.deepcopy(source), other
        train(one)
        train(two)
        assert same_state(state_of(one), state_of(two))
        assert torch.equal(finalize(one)[0].weight, finalize(two)[0].weight)
        assert two[0].weight.requires_grad


@pytest.mark.parametrize("share", [False, True])
def test_a_dense_checkpoint_loads_into_a_live_model(make_mlp, share):
    model = prune.magnitude(make_mlp(), 0.7)
    if share:
        quantize.kmeans(model, 3)
    masks = [compressed(model[index]).mask.clone() for index in (0, 2)]
    dense = make_mlp(seed=1)
    given = dense.state_dict()
    keys = list(given)
    model.load_state_dict(given)
    assert list(given) == keys
    for mask, index in zip(masks, (0, 2), strict=True):
        assert torch.equal(model[index].weight == 0, ~mask)
        assert torch.equal(model[index].bias, dense[index].bias)
        if not share:
            assert torch.equal(model[index].weight, torch.where(mask, dense[index].weight, 0))
            continue
        codes = compressed(model[index]).codes
        for code in codes[mask].unique():
            members = mask & (codes == code)
            mean = dense[index].weight[members].double().mean().float()
            torch.testing.assert_close(model[index].weight[members], mean.expand(int(members.sum())))


@pytest.mark.parametrize("share", [False, True])
def test_the_checkpoint_of_a_finalized_model_loads_back_to_the_bit(mlp, train, share):
    prune.magnitude(mlp, 0.7)
    if share:
        quantize.kmeans(mlp, 3)
    train(mlp)
    done = finalize(copy.deepcopy(mlp))
    train(mlp)
    mlp.load_state_dict(done.state_dict())
    assert torch.equal(mlp[0].weight, done[0].weight)
    assert torch.equal(mlp[2].weight, done[2].weight)


def test_a_wrong_shape_is_torchs_own_error(mlp):
    quantize.kmeans(prune.magnitude(mlp, 0.5), 3)
    state = {"0.weight": torch.ones(3, 3), **{k: v for k, v in mlp.state_dict().items() if not k.startswith("0.para")}}
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.parametrizations\.weight\.original"):
        mlp.load_state_dict(state)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("codes", torch.full((17, 20), 200, dtype=torch.uint8), r"codes must lie in \[0, 8\), got 200"),
        ("codes", torch.zeros(17, 20), "codes must be uint8"),
        ("codes", torch.zeros(3, dtype=torch.uint8), "codes must be uint8"),
        ("codes", None, "must come together"),
        ("codebook", torch.zeros(8), r"codebook must be \[1, entries\]"),
        ("codebook", torch.zeros(1, 257), r"codebook must be \[1, entries\]"),
    ],
)
def test_a_state_whose_codes_do_not_fit_is_refused(mlp, key, value, message):
    quantize.kmeans(prune.magnitude(mlp, 0.5), 3)
    state = mlp.state_dict()
    name = f"0.parametrizations.weight.0.{key}"
    if value is None:
        del state[name]
    else:
        state[name] = value
    before = mlp[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match=message):
        mlp.load_state_dict(state)
    assert torch.equal(mlp[0].weight, before)


def test_an_assigned_weight_is_masked_and_projected(mlp):
    prune.magnitude(mlp, 0.5)
    mask = compressed(mlp[0]).mask
    with torch.no_grad():
        mlp[0].weight = torch.full((17, 20), 3.0)
    assert torch.equal(mlp[0].weight, torch.where(mask, 3.0, 0.0))
    quantize.kmeans(mlp, 2)
    with torch.no_grad():
        mlp[0].weight = torch.full((17, 20), 5.0)
    assert torch.equal(mlp[0].weight, torch.where(mask, 5.0, 0.0))


@pytest.mark.parametrize("share", [False, True])
def test_a_deep_copy_is_on_its_own(mlp, train, share):
    prune.magnitude(mlp, 0.7)
    if share:
        quantize.kmeans(mlp, 3)
    x = torch.randn(4, 20)
    expected = mlp(x)
    replica = copy.deepcopy(mlp)
    train(replica)
    prune.magnitude(replica, 0.9)
    assert torch.equal(mlp(x), expected)
    finalize(replica)
    assert is_live(mlp) and not is_live(replica)
    assert torch.equal(mlp(x), expected)
    assert type(replica[0]) is nn.Linear
    # And the other way round.
    replica = copy.deepcopy(mlp)
    finalize(mlp)
    assert is_live(replica) and not is_live(mlp)
    assert torch.equal(replica(x), expected) and torch.equal(mlp(x), expected)
    assert torch.equal(finalize(replica)(x), expected)


def test_attaching_another_tensor_to_a_copy_leaves_the_original_whole():
    model = prune.magnitude(nn.Sequential(nn.LSTM(4, 4)), 0.5, targets="0.weight_ih_l0")
    replica = copy.deepcopy(model)
    prune.magnitude(replica, 0.5, targets="0.weight_hh_l0")
    assert isinstance(model[0].weight_hh_l0, nn.Parameter)
    assert not isinstance(replica[0].weight_hh_l0, nn.Parameter)
    x = torch.randn(3, 2, 4)
    assert model(x)[0].shape == replica(x)[0].shape


def test_tied_weights_share_one_parametrization(tied):
    tokens = torch.arange(12)
    weight = tied.embedding.weight
    prune.magnitude(tied, 0.5)
    assert compressed(tied.embedding) is compressed(tied.head) is compressed(tied.twin)
    assert int((tied.head.weight == 0).sum()) == 48
    assert torch.equal(tied.head.weight, tied.embedding.weight)
    quantize.kmeans(tied, 3)
    assert len(list(tied.parameters())) == 2 + 2 + 2  # two originals, two codebooks, two biases
    optimizer = torch.optim.SGD(tied.parameters(), lr=0.1)
    tied(tokens).square().mean().backward()
    optimizer.step()
    expected = tied(tokens)
    other = copy.deepcopy(tied)
    other.load_state_dict(tied.state_dict())
    assert torch.equal(other(tokens), expected)
    finalize(tied)
    assert tied.head.weight is tied.embedding.weight is tied.twin.weight is weight
    assert weight.requires_grad
    assert torch.equal(tied(tokens), expected)
    assert torch.equal(finalize(other)(tokens), expected)
    assert other.head.weight is other.embedding.weight


def test_a_weight_tied_after_the_call_joins_its_parametrization():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    shared = model[0].weight
    prune.magnitude(model[0], 0.5)
    model[1].weight = shared
    prune.magnitude(model, 0.75)
    assert compressed(model[0]) is compressed(model[1])
    assert int(model[1].weight.count_nonzero()) == 4


def test_a_shared_module_is_compressed_once(train):
    torch.manual_seed(0)
    layer = nn.Linear(20, 20)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    quantize.kmeans(prune.magnitude(model, 0.5), 3)
    train(model)
    finalize(model)
    assert model[0] is model[2]
    assert int(model[0].weight.count_nonzero()) == 200


@pytest.mark.parametrize("share", [False, True])
def test_dtype_and_device_moves(mlp, share):
    prune.magnitude(mlp, 0.5)
    if share:
        quantize.kmeans(mlp, 3)
    codebook = compressed(mlp[0]).codebook
    values = None if codebook is None else codebook.detach().clone()
    mask = compressed(mlp[0]).mask.clone()
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        mlp.to(dtype)
        assert mlp[0].weight.dtype == dtype
        assert torch.equal(mlp[0].weight != 0, mask)
        assert compressed(mlp[0]).mask.dtype == torch.bool
        if share:
            assert compressed(mlp[0]).codebook.dtype == torch.float32
            assert torch.equal(compressed(mlp[0]).codebook, values)
    assert copy.deepcopy(mlp).to("meta")[0].weight.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_train_and_finalize(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 17), nn.Linear(17, 5)).to(dtype)
    quantize.kmeans(prune.magnitude(model, 0.5), 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(torch.randn(4, 20, dtype=dtype)).square().mean().backward()
    optimizer.step()
    weight = model[0].weight.detach()
    assert compressed(model[0]).codebook.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    finalize(model)
    assert model[0].weight.dtype == dtype
    assert torch.equal(model[0].weight, weight)
    assert len(weight.unique()) <= 8


def test_what_waits_for_a_gradient_goes_on_waiting(mlp, train):
    """As DistributedDataParallel does, which would average no weight's gradient any more."""
    seen = []
    nodes = [parameter.expand_as(parameter).grad_fn.next_functions[0][0] for parameter in mlp.parameters()]
    for index, node in enumerate(nodes):
        node.register_hook(lambda *_, index=index: seen.append(index))
    prune.magnitude(mlp, 0.5)
    train(mlp, steps=1)
    assert sorted(seen) == [0, 1, 2, 3]
    finalize(mlp)
    train(mlp, steps=1)
    assert sorted(seen) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_train_and_eval_reach_the_parametrization(mlp):
    mlp.eval()
    prune.magnitude(mlp, 0.5)
    assert not compressed(mlp[0]).training
    mlp.train()
    assert compressed(mlp[0]).training


@pytest.mark.parametrize("share", [False, True])
def test_a_live_model_compiles_without_a_break(mlp, share):
    torch.compiler.reset()  # what other tests compiled counts towards the limit of one function
    prune.magnitude(mlp, 0.5)
    if share:
        quantize.kmeans(mlp, 3)
    x = torch.randn(4, 20)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), mlp(x))
    compiled(x).sum().backward()
    prune.magnitude(mlp, 0.8)
    assert torch.equal(compiled(x), mlp(x))


def test_a_compiled_optimizer_step_still_works(mlp, train):
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    quantize.kmeans(mlp, 3)
    mlp(torch.randn(4, 20)).sum().backward()
    before = compressed(mlp[0]).codebook.detach().clone()
    quantize.adopt(optimizer)
    torch.compile(lambda: optimizer.step(), backend="aot_eager")()
    assert not torch.equal(compressed(mlp[0]).codebook, before)


def test_attention_and_recurrent_layers_compute_with_the_masked_weight():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    recurrent = nn.LSTM(8, 8, batch_first=True)
    x = torch.randn(2, 3, 8)
    for model, targets, call in (
        (layer, [nn.Linear, "self_attn.in_proj_weight"], lambda: layer(x)),
        (recurrent, nn.LSTM, lambda: recurrent(x)[0]),
    ):
        dense = call()
        order = [name for name, _ in model.named_parameters()]
        quantize.kmeans(prune.magnitude(model, 0.5, targets=targets), 4, targets=targets)
        live = call()
        assert not torch.allclose(live, dense)
        with torch.no_grad():
            fast = call()
        torch.testing.assert_close(fast, live)
        finalize(model)
        torch.testing.assert_close(call(), live)
        assert [name for name, _ in model.named_parameters()] == order


def test_another_parametrization_on_another_tensor_stays(mlp):
    nn.utils.parametrizations.weight_norm(mlp[0], "bias", dim=None)
    prune.magnitude(mlp, 0.5)
    finalize(mlp)
    assert parametrize.is_parametrized(mlp[0], "bias")
    assert not parametrize.is_parametrized(mlp[0], "weight")
    assert int(mlp[0].weight.count_nonzero()) == 170


def test_a_dense_checkpoint_of_another_run_is_clustered_anew(make_mlp):
    model, fresh = make_mlp(), make_mlp(seed=1)
    quantize.kmeans(model, 4)
    model.load_state_dict(fresh.state_dict())
    dense = fresh[0].weight.detach().clone()
    quantize.kmeans(fresh, 4)

    def lost(layer):
        return float((layer.weight.detach() - dense).square().sum())

    assert lost(model[0]) <= 1.001 * lost(fresh[0]) < 0.02 * float(dense.square().sum())
    assert compressed(model[0]).codebook.requires_grad


def test_a_live_recurrent_module_can_be_copied_after_a_forward_pass():
    torch.manual_seed(0)
    model = torch.nn.LSTM(5, 7)
    prune.magnitude(model, 0.5, targets="weight_*")
    x = torch.randn(3, 1, 5)
    expected = model(x)[0]
    release_graphs(model)
    copied = finalize(copy.deepcopy(model))
    assert torch.equal(copied(x)[0], expected)
    assert torch.equal(model(x)[0], expected)


def test_zeros_of_a_dense_checkpoint_stay_zero_when_it_is_clustered(make_mlp):
    model, pruned = make_mlp(), make_mlp(seed=1)
    quantize.kmeans(model, 4)
    finalize(prune.magnitude(pruned, 0.8))
    model.load_state_dict(pruned.state_dict())
    assert torch.equal(model[0].weight == 0, pruned[0].weight == 0)


def test_a_checkpoint_that_is_not_finite_is_refused_by_a_shared_weight(make_mlp):
    model = make_mlp()
    quantize.kmeans(model, 4)
    before = model[0].weight.detach().clone()
    state = make_mlp(seed=1).state_dict()
    state["0.weight"][0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"0\.weight must be finite to be shared, got NaN or infinity"):
        model.load_state_dict(state)
    assert torch.equal(model[0].weight, before)
