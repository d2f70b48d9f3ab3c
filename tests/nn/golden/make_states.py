"""Wrote states_1.pt: the state dict of every layer of version 0.1.0, an input and its output.

A new form of a state gets a file of the next number: python tests/nn/golden/make_states.py 2. A file is then never
written again, but for a new layer, which the newest file gets.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from every_layer import LAYERS, build


def states() -> dict[str, dict[str, object]]:
    """By kind of layer."""
    made = {}
    for kind in LAYERS:
        layer, x = build(kind, batch=1)
        with torch.no_grad():
            made[kind] = {"state": layer.state_dict(), "input": x, "output": layer(x)}
    return made


if __name__ == "__main__":
    torch.save(states(), Path(__file__).parent / f"states_{sys.argv[1]}.pt")
