import copy
import dataclasses
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune as torch_prune

from tersetorch.conversion import convert, report
from tersetorch.methods import prune, quantize
from tersetorch.methods.parametrization import is_live
from tersetorch.nn import SparseCodebookLinear, SparseLinear


def reasons(model):
    return {layer.name: layer.reason for layer in report(model).layers}


def calls_of(model, *args, **kwargs):
    """How often each sparse layer of model runs, without hooks, which would change the path."""
    counts = {}
    patched = []
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear | SparseCodebookLinear):
            counts[name] = 0

            def counted(*inner, name=name, forward=module.forward, **options):
                counts[name] += 1
                return forward(*inner, **options)

            module.forward = counted
            patched.append(module)
    with torch.no_grad():
        model(*args, **kwargs)
    for module in patched:
        del module.forward
    return counts


@pytest.fixture
def net(sparse_linear):
    return nn.Sequential(sparse_linear(40, 30), nn.ReLU(), sparse_linear(30, 20, distinct=9), nn.Dropout(0.5))


@pytest.fixture
def x(generator):
    return torch.randn(6, 40, generator=generator)


def test_answers_stay_the_same_and_the_report_says_why(net, x, timer):
    fast = convert(net, x)
    assert [type(module) for module in fast] == [SparseLinear, nn.Identity, SparseLinear, nn.Dropout]
    torch.testing.assert_close(fast.eval()(x), net.eval()(x))
    result = report(fast)
    assert result.plan == {"0": "csr", "2": "csr"}
    assert (result.dense_ms, result.converted_ms, result.wins) == (10, 5, 15)
    assert result.max_difference < 1e-5
    assert result.machine["threads"] == torch.get_num_threads()
    assert all("faster: 0.5 ms against 1 ms" in layer.reason for layer in result.layers)
    assert calls_of(fast, x) == {"0": 1, "2": 1}


def test_dense_stays_where_nothing_is_faster(net, x, timer):
    timer.seconds |= {"csr": 2e-3, "sparse_codebook": 2e-3}
    fast = convert(net, x)
    assert fast is not net
    assert [type(module) for module in fast] == [type(module) for module in net]
    assert "the model stays as it is" in report(fast).reason
    assert timer.count("model") == 0


def test_the_model_is_left_as_it_was(net, x, timer):
    net[0](x).sum().backward()
    net[2].eval()
    net.register_buffer("count", torch.zeros(()))
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    identities = {name: (id(tensor), tensor._version) for name, tensor in net.named_parameters()}
    gradient = net[0].weight.grad.clone()
    modules, given = list(net.modules()), x.clone()
    generators = torch.get_rng_state(), random.getstate()
    fast = convert(net, x)
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert {name: (id(tensor), tensor._version) for name, tensor in net.named_parameters()} == identities
    assert torch.equal(net[0].weight.grad, gradient)
    assert list(net.modules()) == modules
    assert [module.training for module in net] == [True, True, False, True]
    assert [module.training for module in fast] == [True, True, False, True]
    assert torch.equal(x, given)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert not any(module._forward_pre_hooks for module in net)
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


def test_what_a_run_changes_in_the_model_is_not_in_the_result(sparse_linear, timer):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = sparse_linear(5, 5)
            self.register_buffer("runs", torch.zeros(()))

        def forward(self, x):
            self.runs += 1
            x += 1
            return self.fc(x)

    model, x = Counting(), torch.zeros(2, 5)
    fast = convert(model, x)
    assert type(fast.fc) is SparseLinear
    assert float(fast.runs) == float(model.runs) == 0
    assert torch.equal(x, torch.zeros(2, 5))


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: {"input": x}])
def test_forms_of_example_inputs(net, x, timer, wrap):
    assert report(convert(net, wrap(x))).plan == {"0": "csr", "2": "csr"}


def test_model_that_is_a_layer(sparse_linear, x, timer):
    layer = sparse_linear()
    fast = convert(layer, x)
    assert type(fast) is SparseLinear
    assert report(fast).plan == {"": "csr"}
    assert type(convert(layer, plan={"": "csr"})) is SparseLinear


def test_model_without_layers(x, timer):
    fast = convert(nn.ReLU(), x)
    assert report(fast).layers == ()


def test_layers_not_reached_stay(sparse_linear, timer):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = sparse_linear(5, 5), sparse_linear(5, 5)

        def forward(self, x):
            return self.used(x)

    fast = convert(Half(), torch.ones(2, 5))
    assert type(fast.used) is SparseLinear
    assert type(fast.unused) is nn.Linear
    assert reasons(fast)["unused"] == "not reached by example_inputs"


def test_shared_modules_stay_shared(sparse_linear, x, timer):
    layer = sparse_linear(40, 40)
    fast = convert(nn.Sequential(layer, nn.Sequential(layer), sparse_linear(40, 40)), x)
    assert fast[0] is fast[1][0]
    assert fast[0] is not fast[2]
    assert report(fast).layers[0].names == ("0", "1.0")
    assert calls_of(fast, x) == {"0": 2, "2": 1}


def test_tied_layers_stay_tied(sparse_linear, x, timer):
    model = nn.Sequential(sparse_linear(40, 40), sparse_linear(40, 40), sparse_linear(40, 40))
    model[2].weight = model[0].weight
    model[1].bias = model[0].bias
    fast = convert(model, x)
    assert fast[0].values is fast[2].values
    assert fast[1].bias is fast[0].bias
    assert len(list(fast.parameters())) == 4
    torch.testing.assert_close(fast(x), model(x))


def test_tied_layer_that_is_not_reached_is_swapped_with_the_other(sparse_linear, timer):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = sparse_linear(5, 5), sparse_linear(5, 5)
            self.unused.weight = self.used.weight

        def forward(self, x):
            return self.used(x)

    fast = convert(Half(), torch.ones(2, 5))
    assert fast.used.values is fast.unused.values


def test_embedding_tied_to_the_output_stays(sparse_linear, timer):
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.middle, self.head = nn.Embedding(9, 20), sparse_linear(20, 20), nn.Linear(20, 9)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(self.middle(self.embedding(tokens)))

    fast = convert(Language(), torch.tensor([[1, 2, 3]]))
    assert type(fast.middle) is SparseLinear
    assert fast.head.weight is fast.embedding.weight
    assert "tied to embedding.weight" in reasons(fast)["head"]


def test_layer_that_is_called_and_read_in_some_other_way_is_undone(sparse_linear, timer):
    class Bound(nn.Module):
        """Keeps the method of a layer, whose copy goes on to run the dense code."""

        def __init__(self):
            super().__init__()
            self.first, self.second = sparse_linear(5, 5), sparse_linear(5, 5)
            self.run = functional.linear

        def forward(self, x):
            layer = self.second
            y = layer(x) if type(layer) is nn.Linear else functional.linear(x, layer.weight, layer.bias)
            return self.first(y)

    fast = convert(Bound(), torch.ones(2, 5))
    assert type(fast.first) is SparseLinear
    assert type(fast.second) is nn.Linear
    assert reasons(fast)["second"] == "undone: the model does not call the layer, but uses it in some other way"


def test_model_that_fails_with_a_swapped_layer_gets_it_back(sparse_linear, timer):
    class Strict(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = sparse_linear(5, 5)

        def forward(self, x):
            if not isinstance(self.fc, nn.Linear):
                raise TypeError("fc must be an nn.Linear")
            return self.fc(x)

    fast = convert(Strict(), torch.ones(2, 5))
    assert type(fast.fc) is nn.Linear
    assert reasons(fast)["fc"] == "undone: the model fails: TypeError: fc must be an nn.Linear"
    assert "All swaps were undone" in report(fast).reason


def test_swaps_are_undone_until_the_whole_model_is_faster(sparse_linear, x, timer):
    model = nn.Sequential(*(sparse_linear(40, 40) for _ in range(3)))
    for index, seconds in enumerate((5e-4, 9e-4, 2e-4)):
        timer.seconds[f"{index}: csr"] = seconds
    # The converted model is too slow while it holds three or two sparse layers.
    attempts = iter([2e-2] * 4 + [2e-2] * 4 + [5e-3] * 16)
    timer.seconds["the model: converted model"] = lambda: next(attempts)
    fast = convert(model, x)
    assert report(fast).plan == {"0": "dense", "1": "dense", "2": "csr"}
    assert [type(layer) for layer in fast] == [nn.Linear, nn.Linear, SparseLinear]
    assert "undone: with it the whole model was not faster" in reasons(fast)["1"]
    assert next(attempts, None) is None


def test_all_swaps_can_be_undone(net, x, timer):
    timer.seconds["the model: converted model"] = 1e-2
    fast = convert(net, x)
    assert set(report(fast).plan.values()) == {"dense"}
    assert "All swaps were undone and the model stays as it is" in report(fast).reason
    assert (report(fast).dense_ms, report(fast).converted_ms) == (10, None)
    assert torch.equal(fast.eval()(x), net.eval()(x))


@pytest.mark.parametrize("padding", [None, torch.tensor([[False, False, True], [False, False, False]])])
@pytest.mark.parametrize("frozen", [False, True])
def test_every_layer_swapped_into_a_transformer_runs(sparse_linear, generator, timer, padding, frozen):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    for layer in model.layers:
        layer.linear1, layer.linear2 = sparse_linear(16, 32).eval(), sparse_linear(32, 16).eval()
    model.requires_grad_(not frozen)
    x = torch.randn(2, 3, 16, generator=generator)
    inputs = {"src": x} if padding is None else {"src": x, "src_key_padding_mask": padding}
    fast = convert(model, inputs)
    assert sorted(calls_of(fast, **inputs).values()) == [1, 1, 1, 1]
    assert [type(layer.self_attn.out_proj) for layer in fast.layers] == [
        nn.modules.linear.NonDynamicallyQuantizableLinear
    ] * 2
    assert "its parent MultiheadAttention reads its weight" in reasons(fast)["layers.0.self_attn.out_proj"]
    with torch.no_grad():
        got, expected = fast(**inputs), model(**inputs)
    real = slice(None) if padding is None else ~padding
    torch.testing.assert_close(got[real], expected[real])


def test_cache_remembers_layers_but_the_whole_model_is_timed(net, x, timer):
    convert(net, x)
    layers, whole = timer.count("dense"), timer.count("dense model")
    fast = convert(net, x)
    assert timer.count("dense") == layers
    assert timer.count("dense model") == 2 * whole
    assert all(layer.cached for layer in report(fast).layers)
    assert report(fast).plan == {"0": "csr", "2": "csr"}


def test_another_share_of_zeros_is_measured_anew(net, x, timer):
    """Some layouts skip the zeros of their input."""
    convert(net[:1], x)
    asked = timer.count("csr")
    convert(net[:1], x)
    assert timer.count("csr") == asked
    convert(net[:1], x.relu())
    assert timer.count("csr") > asked


def test_cache_can_be_left_alone(net, x, timer, tmp_path):
    convert(net, x, cache=False)
    assert not (tmp_path / "cache").exists()


def test_a_spoilt_cache_warns_and_measures_again(net, x, timer, tmp_path):
    convert(net, x)
    for path in (tmp_path / "cache" / "decisions").iterdir():
        path.write_text("spoilt")
    with pytest.warns(RuntimeWarning, match=r"convert: the cache of decisions is not used: .* must hold a decision"):
        fast = convert(net, x)
    assert report(fast).plan == {"0": "csr", "2": "csr"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(net, x)


def test_plan_reproduces_the_choice_without_measuring(net, x, timer):
    fast = convert(net, x)
    asked = len(timer.asked)
    again = convert(net, plan=report(fast).plan)
    assert len(timer.asked) == asked
    assert [type(module) for module in again] == [type(module) for module in fast]
    assert torch.equal(again.eval()(x), fast.eval()(x))


def test_many_samples_may_be_multiplied_in_blocks(net, generator, timer):
    x = torch.randn(16, 40, generator=generator)
    timer.seconds["blocked"] = 4e-4
    fast = convert(net.eval(), x)
    assert report(fast).plan == {"0": "blocked", "2": "blocked"}
    options = fast[0].layout_options
    assert fast[0].packed_weight is not None
    torch.testing.assert_close(fast(x), net(x))
    plan = report(fast).plan
    assert convert(net, x, plan=plan)[0].layout_options == options
    # Without an input nobody knows how many there will be.
    assert convert(net, plan=plan)[0].layout_options["column_block"] < options["column_block"]
    # Too few samples: not even tried.
    few = {trial.format: trial.reason for trial in report(convert(net, x[:3])).layers[0].trials}
    assert few["blocked"] == "not tried: made for 4 samples or more, and there are 3"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_convolutions_are_swapped_and_run(generator, timer, memory_format):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=2)).eval()
    line = nn.Sequential(nn.Conv1d(3, 5, 3)).eval()
    for layer in (model[0], model[2], line[0]):
        layer.weight.data *= torch.rand(layer.weight.shape, generator=generator) < 0.3
    x = torch.randn(2, 3, 9, 10, generator=generator).contiguous(memory_format=memory_format)
    fast = convert(model, x)
    assert report(fast).plan == {"0": "sparse_conv2d", "2": "sparse_conv2d"}
    assert {layer.dense_form for layer in report(fast).layers} == {"dense"}
    torch.testing.assert_close(fast(x), model(x))
    again = convert(fast, plan="codebook")
    assert report(again).plan == {"0": "sparse_codebook_conv2d", "2": "sparse_codebook_conv2d"}
    torch.testing.assert_close(again(x), model(x))
    assert report(convert(line, x[:, :, 0])).plan == {"0": "sparse_conv1d"}


def test_dense_convolutions_may_go_into_channels_last(generator, timer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    model[2].weight.data *= torch.rand(model[2].weight.shape, generator=generator) < 0.3
    timer.seconds |= {
        "the model: dense model channels_last": 4e-3,
        "the model: converted model in channels_last": 2e-3,
    }
    x = torch.randn(2, 3, 9, 9, generator=generator)
    fast = convert(model, x)
    assert report(fast).plan == {"0": "dense", "2": "sparse_conv2d"}
    assert report(fast).memory_format == "channels_last" and "in channels_last is faster" in report(fast).reason
    assert fast[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert fast(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fast(x), model(x))
    assert model[0].weight.is_contiguous()


def test_a_dense_model_in_channels_last_counts(generator, timer):
    model = nn.Sequential(nn.Conv2d(3, 8, 3)).eval()
    model[0].weight.data *= torch.rand(model[0].weight.shape, generator=generator) < 0.3
    timer.seconds["dense channels_last"] = 4e-4
    x = torch.randn(2, 3, 9, 9, generator=generator)
    fast = convert(model, x)
    assert report(fast).plan == {"0": "dense"} and "(dense channels_last)" in report(fast).layers[0].reason
    timer.seconds |= {"dense channels_last": 1e-3, "the model: dense model channels_last": 5e-3}
    fast = convert(model, x, cache=False)
    assert report(fast).plan == {"0": "dense"} and "All swaps were undone" in report(fast).reason


def test_rounding_is_for_those_who_allow_an_error(net, x, timer):
    timer.seconds["bitmap_int8"] = 1e-4
    exact = convert(net.eval(), x)
    assert report(exact).plan == {"0": "csr", "2": "csr"}
    tried = {trial.format: trial.reason for trial in report(exact).layers[0].trials}
    assert tried["bitmap_int8"] == "not tried: it rounds, and max_error= allows no error"
    rounded = convert(net, x, max_error=0.02)
    assert report(rounded).plan == {"0": "bitmap_int8", "2": "bitmap_int8"}
    assert 1e-5 < report(rounded).max_difference < 0.02 * float(net(x).abs().max())
    assert torch.equal(rounded[0].weight, net[0].weight)
    strict = convert(net, x, max_error=1e-6)
    assert report(strict).plan == {"0": "csr", "2": "csr"}
    refused = {trial.format: trial.reason for trial in report(strict).layers[0].trials}["bitmap_int8"]
    assert refused.startswith("refused: differs by")


def test_a_model_converted_in_training_mode_is_laid_out_for_evaluation(net, generator, timer):
    x = torch.randn(16, 40, generator=generator)
    timer.seconds["blocked"] = 4e-4
    fast = convert(net.train(), x)
    assert fast.training and fast[0].packed_weight is None
    assert fast.eval()[0].packed_weight is not None
    again = convert(fast, x)
    assert report(again).plan == {"0": "blocked", "2": "blocked"}


def test_plan_with_example_inputs_reports_the_difference(net, x):
    assert report(convert(net, plan="sparse")).max_difference is None
    assert report(convert(net, x, plan="sparse")).max_difference < 1e-5


def test_a_converted_model_is_decided_anew_from_its_dense_form(net, x, timer):
    fast = convert(net, x)
    assert report(fast).plan == {"0": "csr", "2": "csr"}
    again = convert(fast, plan="codebook", example_inputs=x)
    assert report(again).plan == {"0": "sparse_codebook", "2": "sparse_codebook"}
    assert torch.equal(again[0].weight, net[0].weight) and torch.equal(again[0].bias, net[0].bias)
    assert report(convert(again, x)).plan == report(fast).plan
    assert type(fast[0]) is SparseLinear
    dense = convert(fast, plan={"0": "dense"})
    assert torch.equal(dense.eval()(x), net.eval()(x))


def test_a_converted_model_keeps_ties_flags_and_sparse_layers_with_hooks(x):
    first, second = nn.Linear(40, 40), nn.Linear(40, 40, bias=False)
    second.weight = first.weight
    first.weight.requires_grad_(False)
    fast = convert(nn.Sequential(first, second, nn.Linear(40, 3)).eval(), plan="sparse")
    fast[2].register_forward_hook(lambda *args: None)
    dense = convert(fast, plan={"0": "dense", "1": "dense"})
    assert dense[0].weight is dense[1].weight and not dense[0].weight.requires_grad
    assert not dense.training and type(dense[2]) is SparseLinear
    with pytest.raises(ValueError, match="plan must leave '2' csr, got 'dense': already a SparseLinear, with hooks"):
        convert(fast, plan={"2": "dense"})


def test_an_encoder_layer_made_dense_again_has_its_fast_path_back():
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    fast = convert(encoder, plan="sparse")
    assert fast.activation_relu_or_gelu == 0
    assert convert(fast, plan={"linear1": "dense", "linear2": "dense"}).activation_relu_or_gelu == 1


def test_live_models_are_finalized_in_the_copy(x, timer):
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20)).eval()
    prune.magnitude(model, 0.9)
    quantize.kmeans(model, bits=3)
    fast = convert(model, x)
    assert is_live(model)
    assert not is_live(fast)
    assert report(fast).plan == {"0": "csr", "2": "csr"}
    assert all(layer.distinct <= 7 and layer.density == pytest.approx(0.1) for layer in report(fast).layers)
    torch.testing.assert_close(fast(x), model(x))
    shared = convert(model, plan="codebook")
    assert [type(module) for module in shared] == [SparseCodebookLinear, nn.Identity, SparseCodebookLinear]
    torch.testing.assert_close(shared(x), model(x))


def test_autocast_is_the_callers(net, x, timer):
    net.eval()
    with torch.autocast("cpu", torch.bfloat16):
        fast = convert(net, x)
        assert report(fast).plan == {"0": "csr", "2": "csr"}
        got, expected = fast(x), net(x)
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


def test_result_trains(net, x, timer):
    fast = convert(net, x)
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.1)
    before = [parameter.clone() for parameter in fast.parameters()]
    fast(x).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, fast.parameters(), strict=True))


def test_result_copies_and_keeps_its_state(net, x, timer):
    fast = convert(net, x).eval()
    other = convert(net, plan=report(fast).plan).eval()
    other.load_state_dict(fast.state_dict())
    assert torch.equal(copy.deepcopy(fast)(x), fast(x))
    assert torch.equal(other(x), fast(x))


@pytest.mark.slow
def test_result_compiles(net, x):
    fast = convert(net, plan="sparse").eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(fast, fullgraph=True)(x), fast(x))


def test_result_exports(net, x):
    fast = convert(net, plan="sparse").eval()
    exported = torch.export.export(fast, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(exported.module()(x[:5]), fast(x[:5]))


def test_bfloat16_models_convert(net, x, timer):
    net, x = net.bfloat16().eval(), x.bfloat16()
    fast = convert(net, x)
    assert report(fast).plan == {"0": "csr", "2": "csr"}
    torch.testing.assert_close(fast(x), net(x))


def test_made_in_inference_mode_it_can_still_train(net, x, timer):
    with torch.inference_mode():
        fast = convert(net, x)
    fast(x.clone()).sum().backward()
    assert fast[0].values.grad is not None


def test_progress_draws_a_bar(net, x, timer, capsys):
    convert(net, x, progress=True)
    assert "convert" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({}, ValueError, "example_inputs must be given unless plan is, got None"),
        ({"example_inputs": [torch.zeros(1, 40)]}, TypeError, "example_inputs must be a tensor, a tuple"),
        ({"example_inputs": torch.zeros(1, 41)}, ValueError, "example_inputs must be what the model is called with"),
        ({"plan": "sparse", "max_error": -1.0}, ValueError, "max_error must be finite and at least 0, got -1.0"),
        ({"plan": "sparse", "max_error": float("nan")}, ValueError, "max_error must be finite and at least 0, got nan"),
        ({"plan": "sparse", "max_error": "1"}, TypeError, "max_error must be a number or None, got str"),
        ({"plan": "sparse", "cache": 1}, TypeError, "cache must be True or False, got 1"),
        ({"plan": "sparse", "progress": None}, TypeError, "progress must be True or False, got None"),
        ({"plan": "sparse", "seed": 0.5}, TypeError, "seed must be an integer, got float"),
    ],
)
def test_bad_arguments_are_refused(net, arguments, kind, message):
    with pytest.raises(kind, match=f"^convert: {message}"):
        convert(net, **arguments)
    assert not any(module._forward_pre_hooks for module in net)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_script_modules_are_left_alone(net, x, timer, sparse_linear):
    model = nn.Sequential(torch.jit.trace(net.eval(), x), sparse_linear(20, 20))
    fast = convert(model, x)
    assert report(fast).plan == {"0.0": "dense", "0.2": "dense", "1": "csr"}
    torch.testing.assert_close(fast(x), model(x))


def test_compiled_models_are_refused(net, x):
    for model in (torch.compile(net), nn.Sequential(torch.compile(net))):
        with pytest.raises(ValueError, match=r"model must be eager, got one that went through torch\.compile"):
            convert(model, x)


def test_pruned_by_torch_must_be_made_permanent_first(x):
    model = nn.Sequential(nn.Linear(40, 30))
    torch_prune.l1_unstructured(model[0], "weight", 0.9)
    with pytest.raises(
        ValueError, match=r"copyable with copy\.deepcopy(?s:.*)remove the hooks of torch\.nn\.utils\.prune"
    ):
        convert(model, plan="sparse")
    torch_prune.remove(model[0], "weight")
    fast = convert(model, plan="sparse")
    torch.testing.assert_close(fast(x), model(x))


def test_bad_models_are_refused(x):
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got function"):
        convert(lambda x: x, x)
    with pytest.raises(ValueError, match=r"model must be initialised, got '0\.weight' without a shape"):
        convert(nn.Sequential(nn.LazyLinear(3)), x)
    with pytest.raises(
        ValueError, match="example_inputs must be what the model is called with, got NotImplementedError"
    ):
        convert(nn.ModuleList([nn.Linear(3, 3)]), x)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(40, 30)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        noise = torch.rand(()) + np.random.rand() + random.random()
        return Output(self.fc(x) * self.calls + noise)


@dataclasses.dataclass
class Output:
    logits: torch.Tensor


@pytest.mark.parametrize("plan", [None, "sparse"])
def test_the_difference_of_stateful_and_random_models_is_that_of_the_layers(x, timer, plan):
    torch.manual_seed(0)
    model = prune.magnitude(Counting(), 0.9)
    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    fast = convert(model, x, plan=plan)
    after = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert report(fast).plan == {"fc": "csr"}
    assert report(fast).max_difference < 1e-5
    assert model.calls == fast.calls == 0


class Bypassing(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(40, 30)

    def forward(self, x):
        return nn.functional.linear(x, self.fc.weight, self.fc.bias) if type(self.fc) is not nn.Linear else self.fc(x)


def test_a_plan_leaves_layers_dense_that_the_model_would_not_call(x):
    fast = convert(Bypassing(), x, plan="sparse")
    assert type(fast.fc) is nn.Linear
    assert "does not call the layer" in reasons(fast)["fc"]
