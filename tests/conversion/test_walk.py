import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from tersetorch.conversion.candidates import CANDIDATES
from tersetorch.conversion.walk import find_sites, groups_of, label
from tersetorch.nn import SparseLinear


def sites_by_name(model):
    return {site.name: site for site in find_sites(model, CANDIDATES)}


class OwnLinear(nn.Linear):
    pass


def with_hook(layer, register):
    getattr(layer, register)(lambda *args: None)
    return layer


def with_attribute(layer, name, value):
    setattr(layer, name, value)
    return layer


def nan_linear():
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    return layer


def test_plain_linear_may_be_swapped():
    (site,) = find_sites(nn.Linear(3, 2), CANDIDATES)
    assert site.names == ("",)
    assert site.kept is None
    assert label(site.name) == "(the model)"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: OwnLinear(3, 2), "OwnLinear is a subclass of Linear, which may compute something else"),
        (lambda: nn.Conv3d(3, 2, 1), "no format runs a Conv3d"),
        (lambda: nn.EmbeddingBag(3, 2), "no format runs a EmbeddingBag"),
        (lambda: nn.Linear(3, 2).double(), "its weight is torch.float64"),
        (lambda: nn.Linear(3, 2).half(), "its weight is torch.float16"),
        (lambda: nn.Linear(3, 2, device="meta"), "its weight is on meta"),
        (lambda: nn.Linear(0, 2), "its weight is empty"),
        (nan_linear, "its weight holds NaN or infinity"),
        (lambda: with_hook(nn.Linear(3, 2), "register_forward_hook"), "it carries hooks"),
        (lambda: with_hook(nn.Linear(3, 2), "register_forward_pre_hook"), "it carries hooks"),
        (lambda: with_hook(nn.Linear(3, 2), "register_full_backward_hook"), "it carries hooks"),
        (lambda: with_hook(nn.Linear(3, 2), "register_full_backward_pre_hook"), "it carries hooks"),
        (lambda: with_hook(nn.Linear(3, 2), "register_state_dict_post_hook"), "it carries hooks"),
        (lambda: with_hook(nn.Linear(3, 2), "register_load_state_dict_pre_hook"), "it carries hooks"),
        (lambda: with_attribute(nn.Linear(3, 2), "forward", lambda x: x), "its forward was replaced"),
        (lambda: prune.identity(nn.Linear(3, 2), "weight"), "it carries hooks"),
        (lambda: parametrizations.weight_norm(nn.Linear(3, 2)), "parametrized by other code"),
        (lambda: SparseLinear.from_dense(nn.Linear(3, 2)), "already a SparseLinear, with hooks"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_other_layers_are_kept_with_a_reason(make, reason):
    sites = sites_by_name(nn.Sequential(make(), nn.ReLU(), nn.BatchNorm1d(2)))
    assert list(sites) == ["0"]
    assert reason in sites["0"].kept
    assert groups_of(sites.values()) == []


def test_quantised_layers_are_kept():
    class Quantized(nn.Module):
        def weight(self):
            raise AssertionError("not to be called")

    assert "it is quantised" in sites_by_name(nn.Sequential(Quantized()))["0"].kept


def test_tensor_subclasses_are_kept():
    class Packed(torch.Tensor):
        pass

    layer = nn.Linear(3, 2)
    layer.weight = nn.Parameter(torch.zeros(2, 3).as_subclass(Packed))
    assert "its weight is a Packed, not a plain tensor" in sites_by_name(nn.Sequential(layer))["0"].kept


def test_attention_reads_its_projection():
    sites = sites_by_name(nn.TransformerEncoderLayer(8, 2, 16))
    assert "its parent MultiheadAttention reads its weight" in sites["self_attn.out_proj"].kept
    assert sites["linear1"].kept is None
    assert sites["linear2"].kept is None


def test_nested_names_and_shared_modules():
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ModuleList([shared])), "b": nn.Linear(3, 2)})
    sites = find_sites(model, CANDIDATES)
    assert [site.names for site in sites] == [("a.0", "a.1.0"), ("b",)]
    assert [[site.name for site in group] for group in groups_of(sites)] == [["a.0"], ["b"]]


def test_linears_tied_to_each_other_are_one_group():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    sites = find_sites(model, CANDIDATES)
    assert [[site.name for site in group] for group in groups_of(sites)] == [["0", "2"], ["1"]]


def test_linear_tied_to_an_embedding_is_kept():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    model[1].weight = model[0].weight
    assert sites_by_name(model)["1"].kept == "its weight is tied to 0.weight, which stays as it is"


def test_tie_to_a_kept_linear_keeps_all_of_them():
    model = nn.Sequential(nn.Linear(3, 3), OwnLinear(3, 3))
    model[1].weight = model[0].weight
    assert "tied to 1.weight" in sites_by_name(model)["0"].kept


def test_tie_to_the_parent_keeps_the_layer():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)
            self.matrix = self.fc.weight

    assert "tied to matrix" in sites_by_name(Reader())["fc"].kept


def test_tie_to_a_buffer_keeps_the_layer():
    model = nn.Sequential(nn.Linear(3, 3))
    model.register_buffer("matrix", model[0].weight)
    assert "tied to matrix" in sites_by_name(model)["0"].kept


def test_views_of_one_memory_are_kept():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(model[0].weight.data.t())
    sites = sites_by_name(model)
    assert sites["0"].kept == "its weight shares memory with 1.weight"
    assert sites["1"].kept == "its weight shares memory with 0.weight"
    assert sites["2"].kept is None


def test_neighbours_in_one_memory_are_not_tied():
    flat = torch.randn(2, 3, 3)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    for layer, weight in zip(model, flat, strict=True):
        layer.weight = nn.Parameter(weight)
    assert all(site.kept is None for site in find_sites(model, CANDIDATES))


def test_tied_biases_do_not_keep_a_layer():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].bias = model[0].bias
    assert len(groups_of(find_sites(model, CANDIDATES))) == 2
