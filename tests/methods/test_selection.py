import re

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from tersetorch.methods import prune, quantize
from tersetorch.methods.parametrization import is_live
from tersetorch.methods.selection import assign, select


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
        self.head = nn.ModuleDict({"fc1": nn.Linear(4, 4), "fc2": nn.Linear(4, 2)})
        self.rnn = nn.LSTM(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)


def names(model, targets=None, ignore=None):
    return [target.name for target in select("test", model, targets, ignore)]


def test_default_targets_are_linear_and_conv_weights():
    assert names(Net()) == ["features.0", "features.2", "head.fc1", "head.fc2", "attention.out_proj"]


@pytest.mark.parametrize(
    ("targets", "ignore", "expected"),
    [
        ("head.fc1", None, ["head.fc1"]),
        ("head.fc1.weight", None, ["head.fc1"]),
        ("head.*", None, ["head.fc1", "head.fc2"]),
        ("*fc?", "*1", ["head.fc2"]),
        (r"re:head\.fc[12]", None, ["head.fc1", "head.fc2"]),
        (["head.fc2", "features.0"], None, ["features.0", "head.fc2"]),
        (nn.Conv2d, None, ["features.0", "features.2"]),
        ([nn.Conv2d, "head.fc1"], ["features.0"], ["features.2", "head.fc1"]),
        ("rnn", None, ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]),
        (nn.LSTM, "rnn.weight_hh_l0", ["rnn.weight_ih_l0"]),
        ("attention.in_proj_weight", None, ["attention.in_proj_weight"]),
        (None, [nn.Conv2d, "attention.*", nn.BatchNorm2d], ["head.fc1", "head.fc2"]),
        (None, [], ["features.0", "features.2", "head.fc1", "head.fc2", "attention.out_proj"]),
    ],
)
def test_patterns(targets, ignore, expected):
    assert names(Net(), targets, ignore) == expected


def test_a_model_that_is_one_layer():
    assert names(nn.Linear(3, 2)) == ["weight"]
    assert names(nn.Linear(3, 2), "weight") == ["weight"]
    assert names(nn.MultiheadAttention(4, 2), "in_proj_weight") == ["in_proj_weight"]


def test_shared_modules_and_tied_weights_count_once(tied):
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert names(model) == ["0"]
    assert names(model, "2") == ["0"]
    assert names(tied) == ["embedding", "inner"]
    assert names(tied, "twin") == ["embedding"]
    assert names(tied, ignore=nn.Embedding) == ["inner"]


def test_layers_inside_other_parametrizations_are_not_the_models():
    class Through(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, weight):
            return self.inner(weight)

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    nn.utils.parametrize.register_parametrization(model[0], "bias", Through())
    assert names(model) == ["0", "1"]


def test_assign_lets_a_path_win_over_patterns_and_else_the_first():
    chosen = assign("test", "sparsity", Net(), {"head.*": 0.5, nn.Linear: 0.1, "head.fc2": 0.9}, None)
    assert {target.name: value for target, value in chosen} == {
        "head.fc1": 0.5,
        "head.fc2": 0.9,
        "attention.out_proj": 0.1,
    }
    with pytest.raises(ValueError, match="sparsity must name at least one layer"):
        assign("test", "sparsity", Net(), {}, None)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"targets": "fc9"}, ValueError, "targets must match .*'fc9', which matches none; pass a name such as 'feat"),
        ({"targets": "head"}, ValueError, r"'head', which matches none; pass 'head\.\*' for all"),
        ({"targets": "features.1"}, ValueError, "'features.1', which matches none"),
        ({"targets": nn.Conv3d}, ValueError, "Conv3d, which matches none"),
        ({"targets": []}, ValueError, "targets must name at least one layer"),
        ({"targets": 3}, TypeError, "targets must be a pattern or a list of them, got int"),
        ({"targets": [3]}, TypeError, "targets must hold names, globs"),
        ({"targets": int}, TypeError, "targets must hold names, globs"),
        ({"targets": "re:("}, ValueError, "valid regular expressions"),
        ({"ignore": "fc9"}, ValueError, "ignore must match a module, got 'fc9'"),
        ({"ignore": nn.Conv3d}, ValueError, "ignore must match a module, got Conv3d"),
        ({"targets": nn.Linear, "ignore": nn.Linear}, ValueError, "a weight in targets that ignore leaves, got none"),
    ],
)
def test_bad_patterns_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        select("test", Net(), arguments.get("targets"), arguments.get("ignore"))


@pytest.mark.parametrize("model", [nn.Sequential(nn.ReLU()), nn.Module(), nn.BatchNorm1d(3)])
def test_a_model_without_layers_is_refused(model):
    with pytest.raises(ValueError, match="model must have a Linear or Conv layer that ignore leaves, got none"):
        select("test", model, None, None)


def test_no_module_is_refused():
    with pytest.raises(TypeError, match=re.escape("model must be a torch.nn.Module, got Tensor")):
        select("test", torch.ones(3), None, None)


def layer(change=None, **arguments):
    module = nn.Linear(4, 3, **arguments)
    if change is not None:
        change(module)
    return module


def set_weight(value):
    def change(module):
        module.weight.data[1, 2] = value

    return change


UNUSABLE = {
    "nan": (lambda: layer(set_weight(float("nan"))), "must be finite, got NaN or infinity"),
    "inf": (lambda: layer(set_weight(float("-inf"))), "must be finite, got NaN or infinity"),
    "meta": (lambda: layer(device="meta"), "must hold numbers, got a tensor on meta"),
    "lazy": (lambda: nn.LazyLinear(3), "must be initialised, got a lazy one"),
    "complex": (lambda: layer(dtype=torch.complex64), "must be a floating-point tensor, got torch.complex64"),
    "pruned by torch": (lambda: torch_prune.random_unstructured(layer(), "weight", 0.5), "must be a parameter"),
    "spectral norm": (
        lambda: parametrizations.spectral_norm(layer()),
        "must have no other parametrization, got _SpectralNorm",
    ),
    "weight norm": (
        lambda: parametrizations.weight_norm(layer()),
        "must have no other parametrization, got _WeightNorm",
    ),
    "sparse": (
        lambda: layer(lambda m: setattr(m, "weight", nn.Parameter(torch.eye(3).to_sparse()))),
        "must be a plain dense parameter, got torch.sparse_coo",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_weight_that_cannot_be_handled_is_refused_before_anything_changes(case):
    make, message = UNUSABLE[case]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), make())
    with pytest.raises(ValueError, match=f"prune.magnitude: the weight of '1' {message}.*ignore=\\['1'\\]"):
        prune.magnitude(model, 0.5)
    assert type(model[0]) is nn.Linear
    assert int(model[0].weight.count_nonzero()) == 16
    prune.magnitude(model, 0.5, ignore="1")
    assert int(model[0].weight.count_nonzero()) == 8


@pytest.fixture
def one_rank(tmp_path):
    distributed.init_process_group("gloo", f"file://{tmp_path / 'meeting'}", world_size=1, rank=0)
    yield
    distributed.destroy_process_group()


def test_shards_are_refused(one_rank, mlp):
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(mlp[2], mesh=mesh)
    before = mlp[2].weight
    for method in (
        lambda: prune.magnitude(mlp, 0.5),
        lambda: prune.GradualPruner(mlp, 0.5, end_step=2),
        lambda: prune.DynamicSurgery(mlp),
        lambda: prune.obs(mlp, [torch.ones(2, 20)], 0.5),
        lambda: prune.obd(mlp, [(torch.ones(2, 20), torch.zeros(2).long())], "cross_entropy", 0.5),
        lambda: prune.density(mlp),
        lambda: quantize.kmeans(mlp, 3),
    ):
        with pytest.raises(ValueError, match="the weight of '2' must be whole on each rank, got a DTensor; call this"):
            method()
        assert not is_live(mlp) and mlp[2].weight is before
    prune.magnitude(mlp, 0.5, ignore="2")


def test_a_model_in_fully_sharded_data_parallel_is_refused(mlp):
    wrapper = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # sharding itself needs an accelerator
    nn.Module.__init__(wrapper)
    wrapper.inner = mlp
    for targets in (None, "inner.0"):
        with pytest.raises(ValueError, match="here: model must hold whole weights on each rank, got FullySharded"):
            select("here", nn.Sequential(wrapper), targets, None)


@pytest.mark.parametrize("change", [lambda model: prune.magnitude(model, 0.5), lambda model: quantize.kmeans(model)])
def test_inference_mode_is_refused_where_tensors_are_made_that_train(change):
    model = nn.Sequential(nn.Linear(4, 3))
    with torch.inference_mode(), pytest.raises(ValueError, match=r"outside torch\.inference_mode"):
        change(model)
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
