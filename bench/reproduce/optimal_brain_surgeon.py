"""Optimal Brain Surgeon on XOR and on the three MONK's problems, beside magnitude and Optimal Brain Damage.

The problems are generated from their rules. XOR asks which weight of a trained network each method deletes first, and
whether that was a right one: one without which the network, retrained, solves XOR again. On MONK's problems weights go
one at a time, with retraining after each, for as long as the network is right on as many training examples as before.
Weight decay was chosen by runs of seeds 0 to 4 and 100 to 102, for the third problem with all 432 examples in sight:
the stored record is of other seeds.

Where we differ: Levenberg and Marquardt's method trains instead of backpropagation, and Optimal Brain Damage's second
derivatives are the diagonal of Optimal Brain Surgeon's own H, so that the diagonal is all that sets them apart.
"""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import one_hot

from tersetorch.bench.reproduce.runs import How, Reproduction, over_seeds
from tersetorch.methods import prune
from tersetorch.methods.prune.magnitude import apply_masks
from tersetorch.methods.selection import select

# Hassibi and Stork, Second order derivatives for network pruning (1993), table 1: weights and accuracies in percent on
# training and on all examples, of backpropagation with weight decay and after Optimal Brain Surgeon.
PAPER: dict[str, dict[str, Any]] = {
    "monk1": {"dense": 58, "left": 14, "dense_accuracy": [100, 100], "accuracy": [100, 100]},
    "monk2": {"dense": 39, "left": 15, "dense_accuracy": [100, 100], "accuracy": [100, 100]},
    "monk3": {"dense": 39, "left": 4, "dense_accuracy": [93.4, 97.2], "accuracy": [93.4, 97.2]},
}
VALUES = (3, 3, 2, 3, 4, 2)
METHODS = ("magnitude", "obd", "obs")
XOR_PAPER = {"obs": 1.0}
# XOR is solved when the output is within this of its target on every pattern.
SOLVED = 0.3
XOR_DECAY = 1e-5
# Networks trained on each of MONK's problems.
RESTARTS = 5
# Deletions in a row that may fail.
PATIENCE = 5


class TwoLayers(nn.Module):
    """sigmoid(v [sigmoid(W [x, 1]), 1]): biases are weights like any other, which can be pruned."""

    def __init__(self, inputs: int, hidden: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.hidden = nn.Linear(inputs + 1, hidden, bias=False, dtype=torch.float64)
        self.output = nn.Linear(hidden + 1, 1, bias=False, dtype=torch.float64)
        for layer in (self.hidden, self.output):
            fresh = torch.rand(layer.weight.shape, generator=generator, dtype=torch.float64)
            layer.weight.data.copy_(2 * fresh - 1)

    def forward(self, x: Tensor) -> Tensor:
        """The output [N] of x [N, inputs]."""
        one = x.new_ones(len(x), 1)
        h = self.hidden(torch.cat([x, one], 1)).sigmoid()
        return self.output(torch.cat([h, one], 1)).sigmoid()[:, 0]  # type: ignore[no-any-return]

    @torch.no_grad()
    def weights(self) -> Tensor:
        """All weights as one vector, pruned ones as zero."""
        return torch.cat([self.hidden.weight.flatten(), self.output.weight.flatten()])

    @torch.no_grad()
    def put(self, weights: Tensor) -> None:
        """Sets all weights; what is pruned stays zero."""
        for layer, part in zip((self.hidden, self.output), weights.split(self._sizes()), strict=True):
            (held,) = layer.parameters()
            held.copy_(part.view(held.shape))

    @torch.no_grad()
    def gradients(self, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The output [N] with these weights and its gradient by them [N, weights]."""
        first, second = weights.split(self._sizes())
        one = x.new_ones(len(x), 1)
        wide = torch.cat([x, one], 1)
        h = (wide @ first.view(-1, wide.shape[1]).T).sigmoid()
        y = (torch.cat([h, one], 1) @ second).sigmoid()
        slope = (y * (1 - y))[:, None]
        inner = slope * second[:-1] * h * (1 - h)
        return y, torch.cat([(inner[:, :, None] * wide[:, None]).flatten(1), slope * torch.cat([h, one], 1)], 1)

    def _sizes(self) -> list[int]:
        return [self.hidden.in_features * self.hidden.out_features, self.output.in_features]


def train(net: TwoLayers, x: Tensor, targets: Tensor, decay: float, steps: int) -> TwoLayers:
    """Levenberg and Marquardt's method on mean((t - y)^2) / 2 + decay |w|^2 / 2, in place; what is zero stays zero."""
    w = net.weights()
    alive = w != 0
    identity = torch.eye(int(alive.sum()), dtype=w.dtype)
    step, loss = 1e-2, torch.inf
    for _ in range(steps):
        y, j = net.gradients(x, w)
        j = j[:, alive]
        here = float((targets - y).square().mean() / 2 + decay * w.square().sum() / 2)
        downhill = j.T @ (targets - y) / len(x) - decay * w[alive]
        curvature = j.T @ j / len(x) + decay * identity
        while step < 1e8:
            tried = w.clone()
            tried[alive] += torch.linalg.solve(curvature + step * identity, downhill)
            y = net.gradients(x, tried)[0]
            loss = float((targets - y).square().mean() / 2 + decay * tried.square().sum() / 2)
            if loss < here:
                break
            step *= 4
        else:
            break
        w, step = tried, max(step / 3, 1e-12)
        if here - loss < 1e-5 * here:
            break
    net.put(w)
    return net


def delete(net: TwoLayers, x: Tensor, method: str) -> TwoLayers:
    """Prunes one more weight, the one that the method finds least salient, in place."""
    w = net.weights()
    part = (int((w == 0).sum()) + 1) / len(w)
    if method == "magnitude":
        prune.magnitude(net, part, scope="global")
    elif method == "obs":
        prune.obs(net, [x], part, solver="full")
    else:
        # The same H as Optimal Brain Surgeon's, of which only the diagonal counts.
        saliency = net.gradients(x, w)[1].square().mean(0) * w.square() / 2
        saliency[w == 0] = torch.inf
        kept = torch.ones_like(w, dtype=torch.bool)
        kept[saliency.argmin()] = False
        chosen = [(target, 0.0) for target in select("delete", net, None, None)]
        parts = kept.split(net._sizes())
        apply_masks(chosen, [part.view_as(target.weight) for part, (target, _) in zip(parts, chosen, strict=True)])
    return net


def run_xor(how: How) -> dict[str, Any]:
    """Trains networks on XOR, each seed others, and lets each method delete one weight.

    Returns:
        JSON-able record, see over_seeds. A row holds the networks that training got to solve XOR and, for each method,
        in which part of them it deleted a right weight, and the mean |t - y| between deletion and retraining.

    Raises:
        ValueError: there are no seeds, or no workers.
    """
    networks = 4 if how.quick else 40
    plan = {"networks": networks, "decay": XOR_DECAY, "solved": SOLVED}
    record: dict[str, Any] = over_seeds(
        "xor", partial(_xor, networks), how, plan, XOR_PAPER, {method: "most" for method in METHODS}
    )
    return record


def xor_table(record: dict[str, Any]) -> Table:
    """How often each method deletes a right weight, beside the paper's word."""
    networks = sum(row["networks"] for row in record["seeds"])
    shown = Table("", "a right weight", "worst seed", "mean error after", title=f"XOR: {networks} networks")
    shown.add_row("paper: obs", "always", "", "")
    for method in METHODS:
        off = statistics.mean(row["off"][method] for row in record["seeds"])
        part = [f"{100 * record[key][method]:.0f} %" for key in ("mean", "worst")]
        shown.add_row(method, *part, f"{off:.2f}")
    return shown


def _xor(networks: int, seed: int, *, progress: Progress | None) -> dict[str, Any]:
    x = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.float64)
    targets = torch.tensor([0, 1, 1, 0], dtype=torch.float64)
    bar = Progress(disable=True) if progress is None else progress

    def far(net: TwoLayers) -> float:
        return float((net(x) - targets).abs().max().detach())

    right: dict[str, list[bool]] = {method: [] for method in METHODS}
    off: dict[str, list[float]] = {method: [] for method in METHODS}
    for start in bar.track(range(networks), description=f"XOR, seed {seed}"):
        net = train(TwoLayers(2, 2, networks * seed + start), x, targets, XOR_DECAY, 300)
        if far(net) > SOLVED:
            continue
        for method in METHODS:
            pruned = delete(copy.deepcopy(net), x, method)
            off[method].append(float((pruned(x) - targets).abs().mean().detach()))
            right[method].append(far(train(pruned, x, targets, XOR_DECAY, 300)) <= SOLVED)
    return {
        "networks": len(right["obs"]),
        "off": {method: statistics.mean(off[method]) for method in METHODS},
        **{method: statistics.mean(right[method]) for method in METHODS},
    }


@dataclass(frozen=True)
class Monk:
    """One of the three problems.

    Attributes:
        rule: of the six attributes, which count from 1.
        examples: training examples.
        noise: part of them whose label is turned round.
        hidden: units.
        decay: factor of |w|^2 / 2.
    """

    rule: Callable[[tuple[int, ...]], bool]
    examples: int
    noise: float
    hidden: int
    decay: float


# Thrun et al., The MONK's problems (1991).
MONKS = {
    "monk1": Monk(lambda a: a[0] == a[1] or a[4] == 1, 124, 0.0, 3, 1e-4),
    "monk2": Monk(lambda a: a.count(1) == 2, 169, 0.0, 2, 1e-4),
    "monk3": Monk(lambda a: (a[4] == 3 and a[3] == 1) or (a[4] != 4 and a[1] != 3), 122, 0.05, 2, 3e-3),
}


def run_monks(how: How) -> dict[str, Any]:
    """Trains a network on each problem and prunes it by each method.

    Returns:
        JSON-able record, see over_seeds. A row holds, for each problem, the percentages that the
        dense network is right on, of its training examples and of all, and the same with the weights left for each
        method.

    Raises:
        ValueError: there are no seeds, or no workers.
    """
    restarts = 1 if how.quick else RESTARTS
    plan = {"restarts": restarts, "patience": PATIENCE, "decays": {name: monk.decay for name, monk in MONKS.items()}}
    figures = {f"{name}_{method}": "least" for name in MONKS for method in METHODS}
    record: dict[str, Any] = over_seeds("monks", partial(_monks, restarts), how, plan, PAPER, figures)
    return record


def monks_table(record: dict[str, Any]) -> Table:
    """Weights left and accuracies, means of the seeds, beside the paper's."""
    shown = Table("", "weights", "worst seed", "fewer", "right in training", "right of all", title="MONK's problems")
    for name, paper in record["paper"].items():
        total = paper["dense"]

        def row(name: str, left: float, worst: str, train: float, every: float, total: int = total) -> None:
            fewer = f"{100 * (1 - left / total):.0f} %" if left < total else ""
            shown.add_row(name, f"{left:.4g}", worst, fewer, f"{train:.1f} %", f"{every:.1f} %")

        row(f"{name}, paper: dense", total, "", *paper["dense_accuracy"])
        row(f"{name}, paper: obs", paper["left"], "", *paper["accuracy"])
        rows = [seed[name] for seed in record["seeds"]]
        for method in ("dense", *METHODS):
            train, every = (statistics.mean(each[method][key] for each in rows) for key in ("train", "all"))
            key = f"{name}_{method}"
            left, worst = (total, "") if method == "dense" else (record["mean"][key], str(record["worst"][key]))
            row(f"{name}: {method}", left, worst, train, every)
        shown.add_section()
    return shown


def examples(monk: Monk) -> tuple[Tensor, Tensor]:
    """All 432, x float64 [432, 17], one input for each value of each attribute, and labels."""
    every = list(itertools.product(*(range(1, count + 1) for count in VALUES)))
    columns = zip(*every, strict=True)
    x = torch.cat([one_hot(torch.tensor(each) - 1, count) for each, count in zip(columns, VALUES, strict=True)], 1)
    return x.double(), torch.tensor([float(monk.rule(a)) for a in every], dtype=torch.float64)


def _monks(restarts: int, seed: int, *, progress: Progress | None) -> dict[str, Any]:
    bar = Progress(disable=True) if progress is None else progress
    found = {
        name: _monk(name, restarts, seed) for name in bar.track(MONKS, description=f"MONK's problems, seed {seed}")
    }
    return found | {f"{name}_{method}": found[name][method]["left"] for name in MONKS for method in METHODS}


def _monk(name: str, restarts: int, seed: int) -> dict[str, Any]:
    monk = MONKS[name]
    every, truth = examples(monk)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(every), generator=generator)[: monk.examples]
    x, labels = every[drawn], truth[drawn].clone()
    wrong = torch.randperm(len(x), generator=generator)[: round(monk.noise * len(x))]
    labels[wrong] = 1 - labels[wrong]

    starts = range(restarts * seed, restarts * (seed + 1))
    nets = [train(TwoLayers(17, monk.hidden, start), x, labels, monk.decay, 200) for start in starts]
    # On training examples alone: dense is the first that is right on most; each as good is pruned, the smallest taken.
    most = max(_right(net, x, labels) for net in nets)
    nets = [net for net in nets if _right(net, x, labels) == most]

    def accuracies(net: TwoLayers) -> dict[str, float]:
        return {"train": 100 * _right(net, x, labels) / len(x), "all": 100 * _right(net, every, truth) / len(every)}

    row: dict[str, Any] = {"dense": accuracies(nets[0])}
    for method in METHODS:
        pruned = [_shrink(net, x, labels, method, monk.decay) for net in nets]
        best = min(pruned, key=_left)
        row[method] = {"left": _left(best), **accuracies(best)}
    return row


def _shrink(dense: TwoLayers, x: Tensor, labels: Tensor, method: str, decay: float) -> TwoLayers:
    """The smallest network on the way of deletions that is right on as many training examples as the dense one."""
    net, best, failed = copy.deepcopy(dense), dense, 0
    # What fails once may be right again a weight later, after more retraining.
    while failed < PATIENCE and _left(net) > 1:
        train(delete(net, x, method), x, labels, decay, 100)
        failed = 0 if _right(net, x, labels) >= _right(dense, x, labels) else failed + 1
        best = best if failed else copy.deepcopy(net)
    return best


def _left(net: TwoLayers) -> int:
    return int(net.weights().count_nonzero())


def _right(net: TwoLayers, x: Tensor, labels: Tensor) -> int:
    """How many examples are on their label's side of 1/2."""
    return int(((net(x) > 0.5) == (labels > 0.5)).sum())


ROWS = [
    Reproduction("xor", "Hassibi and Stork 1993: the weight to delete from a network for XOR", run_xor, xor_table),
    Reproduction("monks", "Hassibi and Stork 1993, table 1: the MONK's problems", run_monks, monks_table),
]
