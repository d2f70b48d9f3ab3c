"""State dicts of earlier versions: tests/nn/golden holds one of every layer, and what the layer gave."""

from pathlib import Path

import pytest
import torch
from every_layer import LAYERS, build

GOLDEN = sorted(Path(__file__).parent.glob("golden/states_*.pt"), key=lambda path: int(path.stem.split("_")[1]))
STATES = [(path.stem, kind, stored) for path in GOLDEN for kind, stored in torch.load(path).items()]


@pytest.mark.parametrize("name,kind,stored", STATES, ids=[f"{name}-{kind}" for name, kind, _ in STATES])
def test_a_state_of_every_version_loads(name, kind, stored):
    torch.manual_seed(9)  # another weight, with other numbers of non-zeros and values
    layer = LAYERS[kind]().eval()
    layer.load_state_dict(stored["state"])
    with torch.no_grad():
        torch.testing.assert_close(layer(stored["input"]), stored["output"])


@pytest.mark.parametrize("kind", LAYERS)
def test_the_newest_golden_state_has_the_form_of_today(kind):
    stored = {kind: stored["state"] for _, kind, stored in STATES}  # of the newest file that has the layer
    assert kind in stored, "a new layer: tests/nn/golden/make_states.py writes its state"

    def form(state):
        return {name: (tensor.dtype, tensor.dim()) for name, tensor in state.items()}, dict(state._metadata)

    assert form(build(kind)[0].state_dict()) == form(stored[kind]), (
        "a state of another form: raise the layer's _version, load states of the old form in _load_from_state_dict, "
        "and write a golden file of the next number"
    )
