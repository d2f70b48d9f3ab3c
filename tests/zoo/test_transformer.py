import pytest
import torch
from torch.nn import functional

import tersetorch as tt
from tersetorch import zoo


@pytest.fixture
def model():
    torch.manual_seed(0)
    return zoo.Transformer(symbols=11, width=8, blocks=2, heads=2, context=6).eval()


def test_has_the_weights_that_its_sizes_ask_for():
    with torch.device("meta"):
        default = zoo.Transformer()
    linear = sum(layer.weight.numel() for layer in default.modules() if isinstance(layer, torch.nn.Linear))
    assert linear == 4 * 12 * 128**2 + 128 * 256
    biases = 4 * (2 * 2 * 128 + (3 + 1 + 4 + 1) * 128) + 2 * 128
    assert sum(each.numel() for each in default.parameters()) == linear + biases + (256 + 128) * 128


def test_computes_its_formula(model):
    """Attention written out, head by head."""
    tokens = torch.randint(11, (3, 5))
    x = model.symbols(tokens) + model.positions[:5]
    for block in model.blocks:
        query, key, value = block.qkv(block.norm1(x)).split(8, -1)
        mixed = []
        for head in (slice(0, 4), slice(4, 8)):
            scores = query[..., head] @ key[..., head].mT / 2
            scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
            mixed.append(scores.softmax(-1) @ value[..., head])
        x = x + block.proj(torch.cat(mixed, -1))
        x = x + block.down(functional.gelu(block.up(block.norm2(x))))
    torch.testing.assert_close(model(tokens), model.head(model.norm(x)))


def test_sees_nothing_of_what_follows(model):
    tokens = torch.randint(11, (2, 6))
    other = tokens.clone()
    other[:, 4:] = (other[:, 4:] + 1) % 11
    y, z = model(tokens), model(other)
    torch.testing.assert_close(y[:, :4], z[:, :4])
    assert not torch.allclose(y[:, 4], z[:, 4])


def test_is_pruned_and_comes_back_from_a_file(model, tmp_path):
    tokens = torch.randint(11, (4, 6))
    tt.prune.obs(model, [tokens], 0.5)
    tt.finalize(model)
    assert all(
        (layer.weight == 0).sum() * 2 == layer.weight.numel()
        for layer in model.modules()
        if isinstance(layer, torch.nn.Linear)
    )
    tt.save(model, tmp_path / "m.terse")
    twin = tt.load(tmp_path / "m.terse")
    assert type(twin) is zoo.Transformer
    with torch.no_grad():
        assert torch.equal(twin(tokens), model(tokens))


def test_obd_follows_it(model):
    tokens = torch.randint(11, (4, 6))
    tt.prune.obd(model, [(tokens, tokens.roll(-1, 1))], "cross_entropy", 0.5)
    assert (model.blocks[0].qkv.weight == 0).sum() * 2 == model.blocks[0].qkv.weight.numel()


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        (torch.zeros(1, 7, dtype=torch.int64), r"int64 \[N, length\] of 1 to 6 symbols, got torch.int64 \(1, 7\)"),
        (torch.zeros(1, 0, dtype=torch.int64), r"got torch.int64 \(1, 0\)"),
        (torch.zeros(6, dtype=torch.int64), r"got torch.int64 \(6,\)"),
        (torch.zeros(1, 6), r"got torch.float32 \(1, 6\); cut the sequences"),
    ],
)
def test_wrong_tokens_are_refused(model, tokens, sentence):
    with pytest.raises(ValueError, match=sentence):
        model(tokens)
    with pytest.raises(TypeError, match="tokens must be a tensor, got list"):
        model([1])


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="width must be a multiple of heads=3, got 8"):
        zoo.Transformer(width=8, heads=3)
    with pytest.raises(ValueError, match="Transformer: context must be at least 1, got 0"):
        zoo.Transformer(context=0)
    with pytest.raises(TypeError, match=r"Transformer: blocks must be an int, got 1\.5"):
        zoo.Transformer(blocks=1.5)
