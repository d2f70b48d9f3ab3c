import pytest
import torch
from torch import nn
from torch.nn import functional

from tersetorch import load, save
from tersetorch.conversion import convert, report
from tersetorch.conversion.fusion import fuse
from tersetorch.nn import SparseConv2d, SparseLinear


class Block(nn.Module):
    """A layer and its ReLU, with what forward makes of them."""

    def __init__(self, forward, relus=1):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.relu = nn.ReLU()
        self.other = nn.ReLU() if relus == 2 else None
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def chain(m, x):
    return m.b(m.relu(m.a(x)))


def fused(block, plan="sparse"):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    fast = convert(block, x, plan=plan)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), block(x))
    return fast


def test_a_relu_becomes_part_of_the_layer_before_it():
    fast = fused(Block(chain))
    assert fast.a.relu and not fast.b.relu
    assert type(fast.relu) is nn.Identity
    assert "relu=True" in repr(fast.a) and "relu=True" not in repr(fast.b)
    assert {layer.name: layer.relu for layer in report(fast).layers} == {"a": "relu", "b": None}
    assert "sparse" not in report(fast).in_place
    assert "csr + ReLU" in str(report(fast))


def test_a_relu_after_a_dense_layer_overwrites_what_it_returned():
    block = Block(chain)
    fast = fused(block, {"b": "csr"})
    assert fast.relu.inplace and not block.relu.inplace
    assert report(fast).in_place == ("relu",)
    assert "ReLU in place: relu" in str(report(fast))


def test_convolutions_and_batch_normalisation():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.ReLU()
    ).eval()
    x = torch.randn(2, 3, 9, 9)
    fast = convert(net, x, plan={"0": "sparse_conv2d"})
    assert fast[0].relu and type(fast[1]) is nn.Identity
    assert report(fast).in_place == ("4",)  # not the one after a pool
    torch.testing.assert_close(fast(x), net(x))


def test_gradients_are_those_of_the_dense_model():
    block = Block(chain)
    fast = fused(block).train()
    x, same = (torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    fast(x).square().sum().backward()
    block(same).square().sum().backward()
    torch.testing.assert_close(x.grad, same.grad)
    torch.testing.assert_close(fast.a.values.grad, block.a.weight.grad.flatten())
    torch.testing.assert_close(fast.a.bias.grad, block.a.bias.grad)


def test_a_shared_relu_is_fused_where_all_its_layers_can():
    fast = fused(Block(lambda m, x: m.relu(m.b(m.relu(m.a(x))))))
    assert fast.a.relu and fast.b.relu and type(fast.relu) is nn.Identity
    fast = fused(Block(lambda m, x: m.relu(m.b(m.relu(m.a(x))))), {"a": "csr"})
    assert not fast.a.relu and type(fast.relu) is nn.ReLU


@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(lambda m, x: m.relu(y := m.a(x)) + y, id="the output is used elsewhere"),
        pytest.param(lambda m, x: (m.relu(m.a(x)), m.a(x))[0] + m.a(x), id="another call of the layer has no ReLU"),
        pytest.param(lambda m, x: m.relu(m.a(x)) + m.relu(x), id="the ReLU has something else to do"),
        pytest.param(lambda m, x: m.relu(m.a(x) + 1), id="something lies between"),
        pytest.param(lambda m, x: m.relu(m.a(x)) if m.training else m.a(x), id="only in training"),
        pytest.param(lambda m, x: m.a(x) if m.training else m.relu(m.a(x)), id="only in evaluation"),
        pytest.param(lambda m, x: m.relu(m.a(x)) if x.sum() < 1e9 else x, id="a graph that depends on numbers"),
        pytest.param(lambda m, x: m.relu(m.__dict__.setdefault("kept", [m.a(x)])[0]), id="the output is kept"),
        pytest.param(lambda m, x: functional.relu(m.a(x)), id="no module"),
    ],
)
def test_nothing_is_fused_where_it_could_show(forward):
    block = Block(forward).eval()
    x = torch.randn(5, 6)
    fast = convert(block, plan="sparse").eval()
    assert type(fast.a) is SparseLinear and not fast.a.relu
    assert type(fast.relu) is nn.ReLU and not fast.relu.inplace
    assert "kept" not in vars(fast)
    torch.testing.assert_close(fast(x), block(x))


def answer(y, skip):
    return y if skip is None else skip


class Skips(Block):
    def forward(self, x, skip=None):
        h = self.a(x)
        return h if skip is None else self.relu(h) + skip


class Unpacks(Block):
    def forward(self, x):
        if isinstance(x, tuple):
            return self.a(x[0])
        return self.relu(self.a(x))


class Asks(Block):
    def forward(self, x):
        return (self.a, self.b)[isinstance(x, tuple)](x) + self.relu(self.a(x))


class Helps(Block):
    def forward(self, x, skip=None):
        return self.relu(answer(self.a(x), skip))


class Grad(Block):
    def forward(self, x):
        return self.relu(self.a(x)) if torch.is_grad_enabled() else self.a(x)


class Features(Block):
    def forward(self, x):
        return self.relu(self.a(x))

    def features(self, x):
        return self.a(x)


@pytest.mark.parametrize("kind", [Skips, Unpacks, Asks, Helps, Grad, Features])
@pytest.mark.parametrize("plan", ["sparse", {"b": "csr"}])
def test_nothing_is_fused_where_another_path_could_show_it(kind, plan):
    torch.manual_seed(0)
    block = kind(None).eval()
    x = torch.randn(5, 6)
    fast = convert(block, plan=plan)
    assert not getattr(fast.a, "relu", False)
    assert type(fast.relu) is nn.ReLU and not fast.relu.inplace
    with torch.no_grad():
        torch.testing.assert_close(fast(x), block(x))


def test_what_the_modules_around_do_by_themselves_counts():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block(chain)

        def forward(self, x):
            return self.block(x)

    assert convert(Outer(), plan="sparse").block.a.relu
    Outer.before = lambda self, x: self.block.a(x)
    assert not convert(Outer(), plan="sparse").block.a.relu


def test_bits_that_change_on_the_example_undo_it(monkeypatch):
    from tersetorch.conversion import fusion

    monkeypatch.setattr(fusion, "has_one_path", lambda *args: True)
    torch.manual_seed(0)
    block, x = Skips(None).eval(), torch.randn(5, 6)
    fast = convert(block, x, plan="sparse")
    assert report(fast).in_place == () and type(fast.relu) is nn.ReLU and not fast.a.relu
    with torch.no_grad():
        torch.testing.assert_close(fast(x), block(x))


def test_a_layer_and_its_relu_belong_to_one_module():
    inner = nn.Sequential(nn.Linear(6, 6))
    fast = convert(nn.Sequential(inner, nn.ReLU()), plan="sparse")
    assert not fast[0][0].relu and type(fast[1]) is nn.ReLU


@pytest.mark.parametrize("where", ["", "relu"])
def test_hooks_keep_what_they_see(where):
    block = Block(chain)
    block.get_submodule(where).register_forward_hook(lambda *args: None)
    fast = convert(block, plan="sparse")
    assert not fast.a.relu and type(fast.relu) is nn.ReLU


def test_undone_swaps_give_their_relu_back():
    block = Block(chain)
    layer = SparseLinear.from_dense(block.a)
    block.a = layer
    assert fuse(block, [layer]).fused == {"a": "relu"}
    block.relu = nn.ReLU()
    block.run = lambda m, x: m.a(x)
    assert fuse(block, [layer]).fused == {} and not layer.relu


def test_converted_again_the_relu_comes_back():
    block = Block(chain).eval()
    fast = fused(block)
    again = convert(fast, plan={})
    assert type(again.a) is nn.Linear and type(again.relu) is nn.ReLU
    x = torch.randn(5, 6)
    assert torch.equal(again(x), block(x))
    # A layer whose ReLU came from elsewhere stays.
    alone = nn.Sequential(SparseLinear(fast.a.sparse_weight, fast.a.bias, relu=True))
    kept = convert(alone, plan={})
    assert kept[0].relu and "a ReLU" in report(kept).layers[0].reason
    torch.testing.assert_close(kept(x), alone(x))


def test_files_keep_it(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(196, 5), nn.ReLU()).eval()
    x = torch.randn(2, 3, 9, 9)
    fast = convert(net, x, plan={"0": "sparse_conv2d", "3": "blocked"})
    save(fast, tmp_path / "m.terse")
    for read in (load(tmp_path / "m.terse"), load(tmp_path / "m.terse", model=net)):
        assert read[0].relu and read[3].relu and read[3].layout == "blocked"
        assert type(read[0]) is SparseConv2d
        with torch.no_grad():
            assert torch.equal(read(x), fast(x))
    save(nn.Sequential(nn.Linear(3, 3), nn.Identity()), tmp_path / "plain.terse")
    with pytest.raises(ValueError, match=r"model must have Identity\(\) at 1, got ReLU"):
        load(tmp_path / "plain.terse", model=nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
