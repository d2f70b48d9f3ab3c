"""Every layer where people run models: compiled, exported, under autocast, in threads and worker processes, copied."""

import copy
import io
import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from every_layer import LAYERS, build

from tersetorch import nn


def test_every_layer_is_here():
    assert set(LAYERS) == set(nn.__all__)


@pytest.mark.parametrize("kind", LAYERS)
def test_compile_has_no_break_for_any_batch(kind):
    layer = build(kind)[0]
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for batch in (3, 5):
            x = build(kind, batch)[1]
            torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_compile_has_no_break_in_training(kind):
    layer, x = build(kind)
    torch.compiler.reset()
    compiled = torch.compile(layer.train(), fullgraph=True, backend="eager", dynamic=False)
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_export_takes_any_batch(kind):
    layer, x = build(kind)
    with torch.no_grad():
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        other = build(kind, 5)[1]
        torch.testing.assert_close(program.module()(other), layer(other))


@pytest.mark.parametrize("kind", LAYERS)
def test_inference_mode_autocast_and_copies(kind):
    layer, x = build(kind)
    with torch.no_grad():
        want = layer(x)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), want)
    for dtype in (torch.bfloat16, torch.float16):
        # As it comes from a layer that knows nothing of autocast, and from one that follows it.
        for y in (x, x.to(dtype)) if x.is_floating_point() else (x,):
            with torch.no_grad(), torch.autocast("cpu", dtype):
                found = layer(y).to(want.dtype)
            torch.testing.assert_close(found, want, rtol=0.05, atol=0.05 * float(want.abs().max()))
    stored = io.BytesIO()
    torch.save(layer.state_dict(), stored)
    stored.seek(0)
    loaded = copy.deepcopy(layer)
    loaded.load_state_dict(torch.load(stored, weights_only=True))
    for other in (loaded, pickle.loads(pickle.dumps(layer))):
        with torch.no_grad():
            assert torch.equal(other(x), want)


@pytest.mark.parametrize("kind", LAYERS)
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
