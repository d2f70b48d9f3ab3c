"""Every layer where people run models: compiled, exported, under autocast, in threads and worker processes, copied."""

import copy
import io
import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn as dense

import tersetorch as tt
from tersetorch import nn

FORMATS = {"weight_format": "<2,6>", "input_format": "<3,5>", "output_format": "<6,10>"}


def linear():
    return dense.Linear(40, 12)


def conv(kind=dense.Conv2d):
    return kind(6, 8, 3, padding=1)


def pruned(module):
    module.weight.data *= torch.rand_like(module.weight) < 0.3
    return module


def shared(module):
    module.weight.data = torch.randint(9, module.weight.shape) / 8
    return module


def summed(module):
    return tt.finalize(tt.quantize.residual(module, 2, 5))


def binary(module):
    module.weight.data = module.weight.sign() / 4
    return module


LAYERS = {
    "SparseLinear": lambda: nn.SparseLinear.from_dense(pruned(linear())),
    "SparseCodebookLinear": lambda: nn.SparseCodebookLinear.from_dense(pruned(shared(linear()))),
    "SparseConv1d": lambda: nn.SparseConv1d.from_dense(pruned(conv(dense.Conv1d))),
    "SparseCodebookConv1d": lambda: nn.SparseCodebookConv1d.from_dense(pruned(shared(conv(dense.Conv1d)))),
    "SparseConv2d": lambda: nn.SparseConv2d.from_dense(pruned(conv())),
    "SparseCodebookConv2d": lambda: nn.SparseCodebookConv2d.from_dense(pruned(shared(conv()))),
    "CodebookLinear": lambda: nn.CodebookLinear.from_dense(shared(linear())),
    "CodebookConv2d": lambda: nn.CodebookConv2d.from_dense(shared(conv())),
    "CodebookEmbedding": lambda: nn.CodebookEmbedding.from_dense(shared(dense.Embedding(30, 12))),
    "ProductLinear": lambda: nn.ProductLinear.from_dense(linear()),
    "ProductConv2d": lambda: nn.ProductConv2d.from_dense(conv()),
    "ResidualLinear": lambda: nn.ResidualLinear.from_dense(summed(linear())),
    "ResidualConv2d": lambda: nn.ResidualConv2d.from_dense(summed(conv())),
    "LowRankLinear": lambda: nn.LowRankLinear.from_dense(linear(), rank=3),
    "LowRankConv2d": lambda: nn.LowRankConv2d.from_dense(conv(), rank=3),
    "ClusteredConv2d": None,  # tests/nn/test_clustered_conv.py: factorize.bicluster alone makes one
    "FlattenedConv2d": lambda: nn.FlattenedConv2d(6, 8, 3, padding="same", stages=2),
    "BinaryLinear": lambda: nn.BinaryLinear.from_dense(binary(linear())),
    "BinaryConv2d": lambda: nn.BinaryConv2d.from_dense(binary(conv())),
    "SignMaxPool2d": None,  # tests/nn/test_sign_max_pool2d.py: it takes packed signs
    "FixedPointLinear": lambda: nn.FixedPointLinear.from_dense(linear(), **FORMATS),
    "FixedPointConv2d": lambda: nn.FixedPointConv2d.from_dense(conv(), **FORMATS),
}
MADE = [name for name, make in LAYERS.items() if make]


def build(kind, batch=3):
    torch.manual_seed(0)
    layer = LAYERS[kind]().eval()
    shapes = {"2d": (batch, 6, 9, 9), "1d": (batch, 6, 9)}
    x = torch.randn(shapes.get(kind[-2:], (batch, 40)))
    return layer, torch.randint(30, (batch,)) if kind == "CodebookEmbedding" else x


def test_every_layer_is_here():
    assert set(LAYERS) == set(nn.__all__)


@pytest.mark.parametrize("kind", MADE)
def test_compile_has_no_break_for_any_batch(kind):
    layer, x = build(kind)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for batch in (3, 5):
            x = build(kind, batch)[1]
            torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("kind", MADE)
def test_export_takes_any_batch(kind):
    layer, x = build(kind)
    with torch.no_grad():
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        other = build(kind, 5)[1]
        torch.testing.assert_close(program.module()(other), layer(other))


@pytest.mark.parametrize("kind", MADE)
def test_inference_mode_autocast_and_copies(kind):
    layer, x = build(kind)
    with torch.no_grad():
        want = layer(x)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), want)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x).float(), want, rtol=0.05, atol=0.05 * float(want.abs().max()))
    stored = io.BytesIO()
    torch.save(layer.state_dict(), stored)
    stored.seek(0)
    loaded = copy.deepcopy(layer)
    loaded.load_state_dict(torch.load(stored, weights_only=True))
    for other in (loaded, pickle.loads(pickle.dumps(layer))):
        with torch.no_grad():
            assert torch.equal(other(x), want)


@pytest.mark.parametrize("kind", MADE)
def test_threads_share_a_layer(kind):
    layer = build(kind)[0]
    xs = [build(kind, batch)[1] for batch in (1, 2, 3, 8)] * 4
    with torch.inference_mode():
        want = [layer(x) for x in xs]

    def run(x):
        with torch.inference_mode():
            return layer(x)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(run, xs))
    assert all(torch.equal(one, other) for one, other in zip(found, want, strict=True))


def answers(kinds, pipe):
    """In a worker process: what each layer gives; one thread, as DataLoader's have: OpenMP's do not outlive a fork."""
    torch.set_num_threads(1)
    outputs = []
    for kind in kinds:
        layer, x = build(kind)
        with torch.no_grad():
            outputs.append(layer(x).numpy())
    pipe.send(outputs)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes(method):
    kinds = ["SparseLinear", "CodebookLinear", "BinaryConv2d", "FlattenedConv2d"]
    with torch.no_grad():
        want = [layer(x) for layer, x in map(build, kinds)]  # the parent's threads run before the fork
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    worker = context.Process(target=answers, args=(kinds, theirs))
    worker.start()
    assert ours.poll(100)
    for found, expected in zip(ours.recv(), want, strict=True):
        torch.testing.assert_close(torch.from_numpy(found), expected)
    worker.join(20)
    assert worker.exitcode == 0
