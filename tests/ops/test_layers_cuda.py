"""Every layer on a CUDA device, in each layout: without gradients a graph can record its call."""

import contextlib
import os

import pytest
import torch
from every_layer import LAYERS, build, layouts

PRETEND = "TERSETORCH_PRETEND_CUDA" in os.environ
# PyTorch's own convolutions, as is the layout "chain" of flattened ones.
PLAIN = ("ClusteredConv2d",)
pytestmark = pytest.mark.parametrize("device", ["forward"], indirect=True)


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind not in PLAIN])
def test_a_graph_can_record_it_in_every_layout(request, device, kind):
    layer, x = build(kind)
    recording = request.getfixturevalue("emulator").forbid_waiting if PRETEND else contextlib.nullcontext
    for layout in [layout for layout in layouts(layer) if layout != "chain"]:
        with torch.no_grad():
            want = layer.cpu()(x)
            layer.to(device)
            if layout is not None:
                layer.pack(layout)
            moved = x.to(device)
            layer(moved)
            with recording():
                y = layer(moved)
        torch.testing.assert_close(y.cpu(), want, rtol=0.05, atol=0.05 * float(want.abs().max()))
