"""Trains a character LSTM, prunes it, and runs its matrix products on sparse kernels.

    python examples/python/lstm.py -o lstm.terse

nn.LSTM keeps its weights in one fused call, where no layer can be replaced. CellLSTM computes the same from two
nn.Linear a layer, takes over an nn.LSTM's weights, and then prunes and converts like any network. It learns to guess
the next character of Python's own documentation: a few minutes on two cores, --steps for a quick look.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tersetorch as tt

LENGTH, BATCH = 64, 32


class CellLSTM(nn.Module):
    """nn.LSTM(batch_first=True), one direction, from nn.Linear layers.

    i, f, g, o = x W_x^T + b_x + h W_h^T + b_h;  c = sigmoid(f) c + sigmoid(i) tanh(g);  h = sigmoid(o) tanh(c)
    """

    def __init__(self, inputs: int, hidden: int, layers: int = 1) -> None:
        super().__init__()
        sizes = [inputs] + [hidden] * (layers - 1)
        self.of_input = nn.ModuleList(nn.Linear(size, 4 * hidden) for size in sizes)
        self.of_hidden = nn.ModuleList(nn.Linear(hidden, 4 * hidden) for _ in sizes)

    @classmethod
    def from_lstm(cls, lstm: nn.LSTM) -> CellLSTM:
        """The same network as an nn.LSTM, with its weights."""
        if lstm.bidirectional or lstm.proj_size or not lstm.batch_first or not lstm.bias:
            raise ValueError("CellLSTM: lstm must have one direction, biases, batch_first and no projection")
        made = cls(lstm.input_size, lstm.hidden_size, lstm.num_layers)
        with torch.no_grad():
            for index in range(lstm.num_layers):
                for layer, kind in ((made.of_input[index], "ih"), (made.of_hidden[index], "hh")):
                    layer.weight.copy_(getattr(lstm, f"weight_{kind}_l{index}"))
                    layer.bias.copy_(getattr(lstm, f"bias_{kind}_l{index}"))
        return made

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """As nn.LSTM: x [batch, time, inputs]; state and result h, c [layers, batch, hidden]."""
        hidden_size = self.of_hidden[0].in_features
        if state is None:
            zeros = x.new_zeros(len(self.of_input), x.shape[0], hidden_size)
            state = zeros, zeros
        last_h, last_c = [], []
        for index, (of_input, of_hidden) in enumerate(zip(self.of_input, self.of_hidden, strict=True)):
            h, c = state[0][index], state[1][index]
            outputs = []
            for step in of_input(x).unbind(1):  # the inputs of all steps in one product
                i, f, g, o = (step + of_hidden(h)).chunk(4, dim=-1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                outputs.append(h)
            x = torch.stack(outputs, dim=1)
            last_h.append(h)
            last_c.append(c)
        return x, (torch.stack(last_h), torch.stack(last_c))


class Characters(nn.Module):
    """Guesses the next character: an embedding, an LSTM, and a layer of scores."""

    def __init__(self, characters: int, hidden: int = 512, layers: int = 1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 64)
        self.lstm: nn.Module = nn.LSTM(64, hidden, layers, batch_first=True)
        self.scores = nn.Linear(hidden, characters)

    def forward(self, text: Tensor) -> Tensor:
        """Scores [batch, time, characters] of what comes next, for whole numbers [batch, time]."""
        return self.scores(self.lstm(self.embedding(text))[0])


def read_text() -> tuple[Tensor, Tensor, int]:
    """Python's documentation as numbers: to train on, the last tenth held out, and how many characters there are."""
    text = "\n".join(pydoc_data.topics.topics.values())
    known = {character: index for index, character in enumerate(sorted(set(text)))}
    numbers = torch.tensor([known[character] for character in text])
    cut = len(numbers) * 9 // 10
    return numbers[:cut], numbers[cut:], len(known)


def train(model: nn.Module, text: Tensor, steps: int, after_step: Any = None, lr: float = 2e-3) -> None:
    """Minimises the cross-entropy of the next character over random pieces of text."""
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=lr)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        starts = torch.randint(len(text) - LENGTH - 1, (BATCH,), generator=generator)
        pieces = torch.stack([text[start : start + LENGTH + 1] for start in starts])
        loss = nn.functional.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if after_step is not None:
            after_step()
    model.eval()


@torch.no_grad()
def bits_per_character(model: nn.Module, text: Tensor, pieces: int = 64) -> float:
    """The mean of -log2 p(next character) over held-out pieces."""
    starts = torch.linspace(0, len(text) - LENGTH - 1, pieces).long()
    rows = torch.stack([text[start : start + LENGTH + 1] for start in starts])
    loss = nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    return float(loss) / 0.6931471805599453


def compress(model: Characters, text: Tensor, steps: int, sparsity: float = 0.9, bits: int = 5) -> None:
    """Turns the LSTM into layers, prunes them while they train, and shares what is left, in place."""
    assert isinstance(model.lstm, nn.LSTM)
    model.lstm = CellLSTM.from_lstm(model.lstm)
    pruner = tt.prune.GradualPruner(
        model, sparsity=sparsity, begin_step=0, end_step=steps // 2, frequency=10, targets="lstm.*"
    )
    train(model, text, steps, pruner.step)
    tt.quantize.kmeans(model, bits, targets="lstm.*")
    train(model, text, steps // 4, lr=1e-4)
    tt.finalize(model)


def main() -> None:
    """Trains, compresses, stores, measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("lstm.terse"), help="the file to write")
    parser.add_argument("--steps", type=int, default=400, help="of training before and while it is pruned")
    parser.add_argument("--measure", action="store_true", help="only time OUTPUT again, as an earlier run left it")
    parser.add_argument("--json", type=Path, help="store the figures here; those of an earlier run are kept")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    if arguments.json and arguments.json.exists():
        figures = json.loads(arguments.json.read_text())
    text, held_out, characters = read_text()
    torch.manual_seed(0)
    model = Characters(characters)
    if arguments.measure:
        assert isinstance(model.lstm, nn.LSTM)
        model.lstm = CellLSTM.from_lstm(model.lstm)
        model = tt.load(arguments.output, model=model)
    else:
        train(model, text, arguments.steps)
        figures["bits_per_character_before"] = bits_per_character(model, held_out)
        compress(model, text, arguments.steps)
        figures["bits_per_character_after"] = bits_per_character(model, held_out)
    fast = tt.convert(model, held_out[None, :LENGTH])
    tt.save(fast, arguments.output)
    found, file = tt.report(fast), tt.inspect(arguments.output)
    figures |= {
        "dense_bytes": file.dense_bytes,
        "file_bytes": file.file_bytes,
        "dense_ms": found.dense_ms,
        "fast_ms": found.converted_ms,
    }
    print(found)
    print(json.dumps(figures, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
