import sys

import pytest
import torch
from torch import nn

import tersetorch as tt

torchao = pytest.importorskip("torchao")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 8))


def test_quantize_swaps_what_the_filter_names():
    from torchao.quantization import quantize_

    from tersetorch.conversion.torchao_configs import CodebookConfig, ConvertConfig, PruneConfig

    model, x = network(), torch.randn(5, 64)
    quantize_(model, PruneConfig(sparsity=0.75), filter_fn=lambda module, name: name == "0")
    quantize_(model, CodebookConfig(bits=4), filter_fn=lambda module, name: name == "2")
    tt.finalize(tt.prune.magnitude(model[4], 0.5))
    quantize_(model, ConvertConfig("bitmap"), filter_fn=lambda module, name: name == "4")
    assert [type(model[i]) for i in (0, 2, 4)] == [tt.nn.SparseLinear, tt.nn.CodebookLinear, tt.nn.SparseLinear]
    assert model[0].weight.count_nonzero() == 64 * 48 // 4 and model[2].weight.unique().numel() == 16
    assert model[4].layout == "bitmap"
    dense = network()
    for index in (0, 2, 4):
        dense[index].load_state_dict(model[index].to_dense().state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x))
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), dense(x))


def test_what_does_not_suit_a_layer_is_said():
    from torchao.quantization import quantize_

    from tersetorch.conversion.torchao_configs import CodebookConfig, ConvertConfig

    with pytest.raises(ValueError, match="convert: plan must give"):
        quantize_(network(), ConvertConfig("no such format"))
    with pytest.raises(ValueError, match="bits must be"):
        quantize_(network(), CodebookConfig(bits=9))


@pytest.mark.parametrize("name", ["PruneConfig", "CodebookConfig", "ConvertConfig"])
def test_a_layer_that_is_refused_stays_as_it_is(name):
    from torchao.quantization import quantize_

    from tersetorch.conversion import torchao_configs

    config = getattr(torchao_configs, name)(*{"PruneConfig": (0.5,), "CodebookConfig": (2,)}.get(name, ("csr",)))
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU())
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=f"{name}: filter_fn must choose layers that it suits, got a Conv2d"):
        quantize_(model, config, filter_fn=lambda module, path: path == "0")
    assert torch.equal(model[0].weight, before) and type(model[0]) is nn.Conv2d


def test_an_embedding_takes_codes():
    from torchao.quantization import quantize_

    from tersetorch.conversion.torchao_configs import CodebookConfig

    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 2))
    quantize_(model, CodebookConfig(4, "codebook_embedding"), filter_fn=lambda module, path: path == "0")
    assert type(model[0]).__name__ == "CodebookEmbedding" and type(model[1]) is nn.Linear


def test_without_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.core.config", None)
    monkeypatch.delitem(sys.modules, "tersetorch.conversion.torchao_configs", raising=False)
    with pytest.raises(ModuleNotFoundError, match="quantize_ must come from torchao, got no such package"):
        import tersetorch.conversion.torchao_configs  # noqa: F401
