"""Chains of layers of signs: exact thresholds, packed signs between layers, and why a chain ends."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import tersetorch as tt
from tersetorch.conversion.thresholds import ALWAYS, NEVER, UnfoldableError, scaled, thresholds_of
from tersetorch.formats import SignWeight
from tersetorch.methods.binarize import ShiftBatchNorm1d, Sign
from tersetorch.nn import BinaryLinear
from tersetorch.ops import sign_unpack, xnor_matmul


def signs(*shape):
    return torch.where(torch.randn(*shape) >= 0, 1.0, -1.0)


def stir(model, spread=6.0):
    """Batch norms as training may leave them: weights of both signs and 0, ties at integers."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                module.running_mean.normal_(0, spread).round_()
                module.running_var.uniform_(0.5, 50)
                if module.affine:
                    module.weight.normal_()
                    module.weight[:3] = 0
                    module.bias.normal_()
                    module.bias[1::2] = 0
                    module.bias[0] = -0.0
    return model.eval()


def binarized(model, **options):
    tt.binarize.bnn(model, **options)
    return tt.finalize(stir(model))


def mlp(**options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(30, 100),
        nn.BatchNorm1d(100),
        nn.Hardtanh(),
        nn.Linear(100, 70, bias=False),
        nn.BatchNorm1d(70),
        nn.Dropout(0.2),
        nn.Hardtanh(),
        nn.Dropout(0.2),
        nn.Linear(70, 65),
        ShiftBatchNorm1d(65),
        nn.Hardtanh(),
        nn.Linear(65, 10),
        nn.BatchNorm1d(10),
    )
    return binarized(model, **options)


def reasons(model):
    return {layer.name: layer.reason for layer in tt.report(model).layers}


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(40), nn.BatchNorm1d(40, affine=False), ShiftBatchNorm1d(40), nn.Sequential(nn.Identity())]
)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("columns", [1, 7, 64, 150])
def test_thresholds_decide_as_float_modules_do_for_every_sum(norm, scaled, columns):
    stir(nn.Sequential(norm))
    scale = torch.rand(40) if scaled else None
    bias = torch.randn(40) if scaled else None
    # Samples that agree with none, one, two, ... of the weights, all +1 here, meet every sum.
    weight = SignWeight.from_signs(torch.zeros(40, columns, dtype=torch.bool), 1, scale)
    x = torch.where(torch.arange(columns)[None] < torch.arange(columns + 1)[:, None], 1.0, -1.0)
    layer = BinaryLinear(weight, bias)
    modules = list(norm) if isinstance(norm, nn.Sequential) else [norm]
    want = Sign()(norm(layer(x)))
    found = thresholds_of(layer, modules)
    layer.fold_(found.values, found.negated)
    assert torch.equal(sign_unpack(layer(x), 40), want)
    assert not found.flipped.any()
    level = (want == want[0]).all(0)
    assert torch.equal(level, (found.values == ALWAYS) | (found.values == NEVER))


def test_sums_arescaled_as_the_kernel_scales_them():
    columns, rows = 333, 2000
    scale, bias = torch.rand(rows), torch.randn(rows) * 10.0 ** torch.randint(-9, 9, (rows,))
    x = torch.where(torch.arange(columns)[None] < torch.arange(columns + 1)[:, None], 1.0, -1.0)
    weight = SignWeight.from_signs(torch.zeros(rows, columns, dtype=torch.bool))
    layer = BinaryLinear(weight)
    sizes = {"in_features": columns, "out_features": rows}
    dots = torch.arange(-columns, columns + 1, 2).int()
    for more in ({"scale": scale}, {"bias": bias}, {"scale": scale, "bias": bias}):
        got = scaled(dots[:, None].expand(-1, rows), more.get("scale"), more.get("bias"))
        assert torch.equal(got, xnor_matmul(x, layer.bits, **sizes, **more))


@pytest.mark.parametrize("scale", ["none", "row"])
def test_a_network_stays_packed_and_decides_alike(scale):
    model = mlp(scale=scale)
    x = torch.randn(300, 30)
    fast = tt.convert(model, x, plan="binary")
    assert [type(module).__name__ for module in fast] == [
        *["BinaryLinear", "BatchNorm1d", "Identity"],
        *["BinaryLinear", *["Identity"] * 4],
        *["BinaryLinear", *["Identity"] * 2],
        *["BinaryLinear", "BatchNorm1d"],
    ]
    with torch.no_grad():
        want, got = model(x), fast(x)
    assert torch.equal(want.argmax(1), got.argmax(1))
    assert scale == "row" or torch.equal(want, got)
    seen = []
    for module in fast:
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    fast(x)
    assert seen[4:12] == [torch.int64] * 8
    why = reasons(fast)
    assert fast[0].inputs == "real"
    assert "asked for by plan; binary_linear: its input is the model's input input, not signs" in why["0"]
    assert "packs the signs of its input, hands packed signs on: its thresholds stand for 4, 5, 6, 7" in why["3"]
    assert "takes packed signs, returns floats: it is followed by the model's output, not by a Sign; 12 st" in why["11"]
    again = tt.convert(model, plan=tt.report(fast).plan)
    with torch.no_grad():
        assert torch.equal(again(x), got)


@pytest.mark.parametrize("inputs", ["pixels", "signed_pixels"])
@pytest.mark.parametrize("scale", ["none", "row"])
def test_a_network_of_pixels_is_integer_throughout(inputs, scale, tmp_path):
    model = mlp(scale=scale)
    pixels = torch.randint(0, 256, (300, 30)).to(torch.uint8)
    x = pixels / 255 if inputs == "pixels" else 2 * (pixels / 255) - 1
    plan = {"0": f"binary_linear_{inputs}", **dict.fromkeys(["3", "8", "11"], "binary_linear")}
    fast = tt.convert(model, x, plan=plan)
    assert [fast[i].thresholds is not None for i in (0, 3, 8, 11)] == [True, True, True, False]
    assert "takes 8-bit pixels, hands packed signs on: its thresholds stand for 1, 2" in reasons(fast)["0"]
    # What float modules decide of the exact sums.
    first = BinaryLinear.from_dense(model[0], inputs=inputs)
    with torch.no_grad():
        assert torch.equal(sign_unpack(fast[0](pixels), 100), model[2](model[1](first(pixels))))
        got = fast(x)
        assert torch.equal(got.argmax(1), model(x).argmax(1)) and torch.equal(fast(pixels), got)
    tt.save(fast, tmp_path / "m.terse")
    assert torch.equal(tt.load(tmp_path / "m.terse")(x), got)


def test_a_live_model_converts_and_files_keep_the_chain(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(9, 64), nn.Tanh(), nn.Linear(64, 40), nn.BatchNorm1d(40), nn.Tanh(), nn.Linear(40, 3)
    )
    tt.binarize.bnn(model)
    stir(model)
    x = torch.randn(50, 9)
    fast = tt.convert(model, x, plan="binary")
    assert type(fast[2]) is BinaryLinear and fast[2].thresholds is not None
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))
    tt.save(fast, tmp_path / "m.terse")
    loaded = tt.load(tmp_path / "m.terse")
    assert torch.equal(loaded(x), fast(x)) and repr(loaded) == repr(fast)
    parts = tt.inspect(tmp_path / "m.terse").parts
    assert parts["signs"] and parts["thresholds"]
    dense = tt.finalize(model)
    assert torch.equal(tt.load(tmp_path / "m.terse", model=dense)(x), fast(x))
    # Converted again it stays as it is.
    assert "already a BinaryLinear" in reasons(tt.convert(fast, plan="binary"))["2"]


class Net(nn.Module):
    """Two layers of signs behind a Sign, with what forward makes of them."""

    def __init__(self, run):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(40, 40, bias=False) for _ in range(3))
        self.norm, self.other = nn.BatchNorm1d(40), nn.BatchNorm1d(40)
        self.first, self.sign, self.last = Sign(), Sign(), Sign()
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def residual(m, x):
    x = m.first(x)
    return m.c(m.last(m.other(m.b(m.sign(m.norm(m.a(x)))) + x)))


def shortcut_of_sums(m, x):
    y = m.a(m.first(x))
    return m.b(m.sign(m.norm(y))) + y


def shared_sign(m, x):
    return m.c(m.sign(m.other(m.b(m.sign(m.norm(m.a(m.first(x))))))))


def sign_needed_elsewhere(m, x):
    return m.b(m.sign(m.norm(m.a(m.first(x))))) + m.sign(x)


def function_of_signs(m, x):
    return m.b(functional.relu(m.sign(m.norm(m.a(m.first(x))))))


def two_takers(m, x):
    y = m.sign(m.norm(m.a(m.first(x))))
    return m.b(y) - m.c(y)


def viewed(m, x):
    y = m.sign(m.norm(m.a(m.first(x))))
    return m.b(y.view(y.size(0), -1)) - m.c(y.flatten(1))


def gelu_between(m, x):
    return m.b(m.sign(functional.gelu(m.a(m.first(x)))))


def called_twice(m, x):
    return m.b(m.sign(m.norm(m.a(m.sign(m.norm(m.a(m.first(x))))))))


@pytest.mark.parametrize(
    "run,folded,why",
    [
        (residual, ["a"], {"b": "it is followed by add()", "c": "packs the signs"}),
        (shortcut_of_sums, [], {"a": "what a (Linear) returns is used by norm (BatchNorm1d), add()"}),
        (shared_sign, ["a", "b"], {"c": "takes packed signs"}),
        (sign_needed_elsewhere, [], {"a": "sign (Sign) is also called elsewhere"}),
        (function_of_signs, [], {"a": "its signs are used by relu()", "b": "its input is relu(), not signs"}),
        (two_takers, ["a"], {"b": "takes packed signs", "c": "takes packed signs"}),
        (viewed, ["a"], {"b": "takes packed signs", "c": "takes packed signs"}),
        (gelu_between, [], {"a": "it is followed by gelu()"}),
        (called_twice, [], {"a": "it is called 2 times"}),
    ],
)
@pytest.mark.parametrize("given", [False, True])
def test_where_chains_end(run, folded, why, given):
    torch.manual_seed(0)
    model = Net(run)
    tt.binarize.binary_connect(model)
    stir(tt.finalize(model))
    x = torch.randn(60, 40)
    fast = tt.convert(model, x if given else None, plan="binary")
    assert [n for n in "abc" if getattr(getattr(fast, n), "thresholds", None) is not None] == folded
    found = reasons(fast)
    for name, reason in why.items():
        assert reason.replace("(Linear)", "(BinaryLinear)") in found[name].replace("(Linear)", "(BinaryLinear)")
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))


class OtherSign(Sign):
    def forward(self, x):
        return super().forward(x - 1)


def test_other_classes_and_several_rows_end_a_chain():
    model = mlp()
    model[7] = OtherSign().eval()
    fast = tt.convert(model, plan="binary")
    assert "its signs are used by 7 (OtherSign)" in reasons(fast)["3"] and fast[3].thresholds is None
    assert "its input is what 7 (OtherSign) returns, not signs" in reasons(fast)["8"]
    rows = nn.Sequential(Sign(), nn.Linear(9, 7, bias=False), Sign(), nn.Flatten(), nn.Linear(21, 4, bias=False))
    tt.binarize.binary_connect(rows)
    tt.finalize(rows)
    x = torch.randn(5, 3, 9)
    fast = tt.convert(rows, plan="binary")
    assert "4 (BinaryLinear) takes 21 signs, several rows at once" in reasons(fast)["1"]
    with torch.no_grad():
        assert torch.equal(fast(x), rows(x))


class Branches(Net):
    def forward(self, x):
        if self.training:
            return x
        return two_takers(self, x)


def test_what_a_graph_does_not_show_stays_float():
    model = Branches(None)
    tt.binarize.binary_connect(model)
    stir(tt.finalize(model))
    assert "the forward of Branches branches" in reasons(tt.convert(model, plan="binary"))["b"]
    hooked = mlp()
    hooked[5].register_forward_hook(lambda *args: None)
    fast = tt.convert(hooked, plan="binary")
    assert "5 carries hooks" in reasons(fast)["3"] and fast[3].thresholds is None


def test_what_cannot_be_folded_stays_float():
    for change, message in (
        (lambda norm: norm.running_mean.fill_(float("nan")), "what follows it gives NaN"),
        (lambda norm: norm.weight.data.fill_(float("nan")), "what follows it gives NaN"),
    ):
        model = mlp()
        change(model[4])
        assert message in reasons(tt.convert(model, plan="binary"))["3"]
    model = mlp()
    model[4] = nn.BatchNorm1d(70, track_running_stats=False)
    assert "its BatchNorm1d takes the statistics of each batch" in reasons(tt.convert(model, plan="binary"))["3"]
    layer = BinaryLinear(SignWeight.from_dense(signs(5, 9)))
    with pytest.raises(UnfoldableError, match="normalises something else than its 5 rows"):
        thresholds_of(layer, [nn.BatchNorm1d(6)])


def test_layers_that_do_not_multiply_signs_are_refused():
    model = mlp()
    for plan, message in (
        ({"0": "binary_linear"}, "its input is the model's input"),
        ({"3": "binary_conv2d"}, "runs a Conv2d, not a Linear"),
    ):
        with pytest.raises(ValueError, match=message):
            tt.convert(model, plan=plan)
    with torch.no_grad():
        model[3].weight[0, 0] = 0.5
    with pytest.raises(ValueError, match=r"a row must hold \+a and -a only"):
        tt.convert(model, plan={"3": "binary_linear"})
    assert reasons(tt.convert(model, plan="binary"))["3"].startswith("binary_linear: a row must hold")


def test_bfloat16_networks_decide_alike():
    model = mlp().bfloat16()
    x = torch.randn(100, 30).bfloat16()
    fast = tt.convert(model, x, plan="binary")
    assert fast[3].thresholds is not None
    with torch.no_grad():
        assert torch.equal(fast(x).argmax(1), model(x).argmax(1))


def test_measuring_keeps_the_chains_that_are_faster(timer):
    model, x = mlp(), torch.randn(20, 30)
    timer.seconds |= {"codebook_linear": 2e-3, "binary_linear": 1e-4}
    fast = tt.convert(model, x)
    assert tt.report(fast).plan == {"0": "dense", "3": "binary_linear", "8": "binary_linear", "11": "binary_linear"}
    assert fast[3].thresholds is not None and "hands packed signs on" in reasons(fast)["3"]
    # With the last layer undone the one before returns floats.
    timer.seconds["11: binary_linear"] = 2e-3
    fast = tt.convert(model, x, cache=False)
    assert fast[8].thresholds is None and "its signs are used by" not in reasons(fast)["3"]
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))


def test_a_layer_that_pays_only_in_a_chain_is_taken_with_it(timer):
    model, x = mlp(), torch.randn(20, 30)
    timer.seconds |= {"codebook_linear": 2e-3, "binary_linear": 1e-4, "11: binary_linear": 2e-3}
    timer.seconds["the chains: whole"] = 5e-4
    for cached in (False, True):
        fast = tt.convert(model, x)
        assert tt.report(fast).plan == {"0": "dense", **dict.fromkeys(["3", "8", "11"], "binary_linear")}
        assert fast[8].thresholds is not None and "hands packed signs on" in reasons(fast)["8"]
        why = reasons(fast)["11"]
        assert "not faster: 2 ms" in why and "; chains with all such layers faster: 0.5 ms against 1 ms (as dec" in why
        assert tt.report(fast).layers[3].cached == cached
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))
    # Where no chain grows nothing is timed.
    asked = timer.count("the chains: whole")
    alone = binarized(nn.Sequential(Sign(), nn.Linear(30, 20, bias=False), nn.ReLU()))
    tt.convert(alone, x)
    assert timer.count("the chains: whole") == asked


@pytest.mark.parametrize("scale", ["none", "row"])
def test_a_model_in_training_comes_back_in_evaluation(scale):
    # A batch norm of random numbers that stays a module, and one behind a layer of any input.
    model, x = mlp(scale=scale).train(), torch.randn(50, 30)
    model[12].running_var.mul_(1.7)
    before = copy.deepcopy(model.state_dict())
    want = copy.deepcopy(model).eval()(x)
    for given in (x, None):
        fast = tt.convert(model, given, plan="binary")
        assert model.training and not any(module.training for module in fast.modules())
        assert "It is in eval mode, though the original is in train mode" in str(tt.report(fast))
        for _ in range(2):
            assert torch.equal(fast(x).argmax(1), want.argmax(1))
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    # Others train on.
    assert tt.convert(model, plan={}).training
    assert "eval mode" not in tt.report(tt.convert(model.eval(), plan="binary")).reason


def test_measuring_brings_back_a_model_in_evaluation(timer):
    model, x = mlp().train(), torch.randn(20, 30)
    timer.seconds |= {"codebook_linear": 2e-3, "binary_linear": 1e-4}
    fast = tt.convert(model, x)
    assert fast[3].thresholds is not None and not fast.training and model.training
    assert "though the original is in train mode" in tt.report(fast).reason


@pytest.mark.parametrize("last", [False, True])
def test_batch_norms_of_other_dimensions_are_refused(last, tmp_path):
    torch.manual_seed(0)
    parts = [] if last else [Sign(), nn.Linear(10, 5)]
    model = nn.Sequential(Sign(), nn.Linear(64, 10, bias=False), nn.BatchNorm1d(10, affine=False), *parts)
    tt.binarize.binary_connect(model)
    tt.finalize(model.eval())
    x, other = torch.randn(5, 64), torch.randn(3, 10, 64)
    fast = tt.convert(model, x, plan="binary")
    assert type(fast[2]) is nn.Identity
    tt.save(fast, tmp_path / "m.terse")
    for each in (fast, tt.load(tmp_path / "m.terse"), tt.load(tmp_path / "m.terse", model=model)):
        with torch.no_grad():
            assert torch.equal(each(x), model(x))
        for wrong in (other, x[0]):
            with pytest.raises(ValueError, match=r"BinaryLinear: input must be \[N, 64\], since .* behind it, of"):
                each(wrong)
    fast = tt.convert(model, other, plan="binary")
    assert type(fast[2]) is nn.BatchNorm1d
    assert "as a chain it raised for example_inputs: ValueError: BinaryLinear: input must be" in reasons(fast)["1"]
    with torch.no_grad():
        assert torch.equal(fast(other), model(other)) and torch.equal(fast(x), model(x))


def test_the_report_says_what_no_pixels_are():
    model = mlp()
    pixels = torch.randint(0, 256, (300, 30)) / 255
    for inputs, x, said in (
        ("pixels", pixels, ""),
        ("signed_pixels", (pixels - 0.5) / 0.5, ""),
        ("pixels", pixels + 0.001, "its example_inputs are no 8-bit images: up to 0.001 from the nearest k / 255"),
        ("signed_pixels", 4 * pixels, "up to 3 from the nearest 2 k / 255 - 1"),
        ("pixels", pixels / 0, "up to nan from the nearest"),
    ):
        fast = tt.convert(model, x, plan={"0": f"binary_linear_{inputs}"})
        why = reasons(fast)["0"]
        assert said in why and ("8-bit images" in why) == bool(said)


def test_compiles_whole():
    torch.compiler.reset()
    model = mlp()
    fast, x = tt.convert(model, plan="binary"), torch.randn(8, 30)
    with torch.no_grad():
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), fast(x))
        assert torch.equal(torch.export.export(fast, (x,)).module()(x), fast(x))
