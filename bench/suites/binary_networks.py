"""The MLP of the binary-network papers: float networks of its widths, and the converted network of signs.

Speed does not depend on what was learned: weights are drawn, batch norms take their statistics from drawn images. The
network of signs takes images as the bytes they are, divided by 255, and keeps its signs packed between layers. Before
anything is timed it must decide every one of CHECKED images as its simulation in floats does; float networks are
compared with theirs in float64.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_linear_bn_eval

from tersetorch import _native, conversion, zoo
from tersetorch.methods import binarize, finalize

from ..implementations import LeftOut, Mode, max_error_of, refusal
from ..options import Options
from ..peers import per_row_int8
from ..rates import Rates
from ..timing import interleave

SECONDS, QUICK_SECONDS = 2.0, 0.3
IN_FEATURES, CHECKED = 784, 1000
OURS = "tersetorch converted signs"
PLAN = {"fc1": "binary_linear_pixels", "fc2": "binary_linear", "fc3": "binary_linear", "fc4": "binary_linear"}

_mkldnn: Any = torch.ops.mkldnn
_quantized: Any = torch.ops.quantized

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Group:
    """An MLP of one width, and a batch."""

    width: int
    batch: int

    @property
    def case(self) -> str:
        """What records call it."""
        return f"MNIST MLP {IN_FEATURES}-{'-'.join(3 * [str(self.width)])}-10"

    @property
    def label(self) -> str:
        """One line for a person."""
        return f"{self.case}, batch {self.batch}"


def groups(options: Options) -> list[Group]:
    """The MLP that the papers time, or a narrow one."""
    width = 1024 if options.quick else 4096
    batches = options.batches or ((1,) if options.quick else (1, 100))
    return [group for group in (Group(width, batch) for batch in batches) if options.takes_case(group.case)]


@dataclass(frozen=True)
class _Network:
    """What is timed, its arithmetic and the bytes of its weights."""

    call: Call
    mode: Mode
    nbytes: int
    pack_ms: float
    error: float


class BinaryNetworks:
    """Measures groups."""

    def __init__(self, options: Options, rates: Rates) -> None:
        self._options = options
        self._rates = rates

    def measure(self, group: Group) -> tuple[list[dict[str, Any]], list[LeftOut]]:
        """The records of a group, and what was left out."""
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            images = torch.randint(0, 256, (max(CHECKED, group.batch), IN_FEATURES)) / 255
            floats = _calibrated(zoo.BinaryMLP(width=group.width), images)
            trained = zoo.BinaryMLP(width=group.width)
            binarize.bnn(trained)
            signs = finalize(_calibrated(trained, images))
        with torch.inference_mode():
            networks, left_out = self._networks(group, floats, signs, images)
            x = images[: group.batch]
            calls = {name: (lambda n=network: n.call(x)) for name, network in networks.items()}
            times = interleave(calls, (QUICK_SECONDS if self._options.quick else SECONDS) * len(calls)) if calls else {}
        return [self._record(group, name, networks[name], times[name]) for name in times], left_out

    def _networks(
        self, group: Group, floats: nn.Module, signs: nn.Module, images: Tensor
    ) -> tuple[dict[str, _Network], list[LeftOut]]:
        networks, left_out = {}, []
        x = images[: group.batch]
        want = copy.deepcopy(floats).double()(x.double())
        makers: dict[str, tuple[Mode, Callable[[], tuple[Call, int]]]] = {
            "torch F.linear float32": ("float32", lambda: _folded(floats, _plain)),
            "oneDNN packed float32": ("float32", lambda: _folded(floats, _packed(group.batch))),
            "torch dynamic int8": ("int8", lambda: _folded(floats, _dynamic_int8)),
            OURS: ("binary", lambda: _converted(signs, x)),
        }
        for name, (mode, make) in makers.items():
            if not self._options.takes(name, name == OURS):
                continue
            start = time.perf_counter()
            call, nbytes = make()
            pack_ms = 1e3 * (time.perf_counter() - start)
            if name == OURS:
                # Decisions, and the share of them that is another than the simulation's.
                error = (call(images).argmax(1) != _simulated(signs, images).argmax(1)).double().mean().item()
            else:
                error = max_error_of(call(x), want)
            wrong = refusal(error, mode)
            if wrong:
                left_out.append(LeftOut(name, group.label, wrong, wrong=True))
            else:
                networks[name] = _Network(call, mode, nbytes, pack_ms, error)
        return networks, left_out

    def _record(self, group: Group, name: str, network: _Network, times: dict[str, float]) -> dict[str, Any]:
        ours = name == OURS
        widths = (IN_FEATURES, *3 * (group.width,), 10)
        operations = 2 * group.batch * sum(a * b for a, b in pairwise(widths))
        level = _native.cpu_active() if ours else _native.cpu_detected()
        limit_ms, bound = self._rates.limit_ms(operations, network.nbytes, network.mode, level, False)
        return {
            "suite": "binary_networks",
            "case": group.case,
            "kind": "network",
            "shape": list(widths),
            "density": 1.0,
            "pattern": "drawn",
            "batch": group.batch,
            "active": 1.0,
            "cache": "warm",
            "threads": self._options.threads,
            "isa": _native.cpu_active(),
            "implementation": name,
            "family": "ours" if ours else "dense",
            "mode": network.mode,
            "pack_ms": network.pack_ms,
            "weight_bytes": network.nbytes,
            "bytes": network.nbytes,
            "ops": operations,
            "limit_ms": limit_ms,
            "limit": bound,
            "fraction_of_limit": limit_ms / times["p30_ms"],
            "max_error": network.error,
            **times,
        }


def _calibrated(model: nn.Module, images: Tensor) -> nn.Module:
    """The model for inference, its batch norms with the statistics of the images."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = None
    model.train()(images)
    return model.eval()


def _layer(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _simulated(signs: nn.Module, images: Tensor) -> Tensor:
    """Scores by torch's own layers, in which all sums of signs are exact.

    A sum of signed pixels is so before the pixels are divided: with those of k / 255 it would depend on its order, and
    here and there a batch norm's threshold lies between two results.
    """
    x = functional.linear((images * 255).round(), _layer(signs, "fc1").weight) * torch.tensor(1 / 255)
    for module in list(signs.children())[1:]:
        x = module(x)
    return x


def _converted(signs: nn.Module, x: Tensor) -> tuple[Call, int]:
    model = conversion.convert(signs, x, plan=PLAN)
    return model, sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _folded(model: nn.Module, pack: Callable[[Tensor, Tensor, bool], tuple[Call, int]]) -> tuple[Call, int]:
    """The float network with its batch norms folded into the layers before, as anybody would run it."""
    layers = []
    for number in range(1, 5):
        norm = model.get_submodule(f"bn{number}")
        assert isinstance(norm, nn.BatchNorm1d)
        linear = fuse_linear_bn_eval(_layer(model, f"fc{number}"), norm)
        layers.append(pack(linear.weight, linear.bias, number < 4))

    def run(x: Tensor) -> Tensor:
        for call, _ in layers:
            x = call(x)
        return x

    return run, sum(nbytes for _, nbytes in layers)


def _plain(weight: Tensor, bias: Tensor, relu: bool) -> tuple[Call, int]:
    def call(x: Tensor) -> Tensor:
        y = functional.linear(x, weight, bias)
        return y.relu_() if relu else y

    return call, weight.nbytes


def _packed(batch: int) -> Callable[[Tensor, Tensor, bool], tuple[Call, int]]:
    def pack(weight: Tensor, bias: Tensor, relu: bool) -> tuple[Call, int]:
        held, after = _mkldnn._reorder_linear_weight(weight, batch), "relu" if relu else "none"
        return lambda x: _mkldnn._linear_pointwise(x, held, bias, after, [], ""), weight.nbytes

    return pack


def _dynamic_int8(weight: Tensor, bias: Tensor, relu: bool) -> tuple[Call, int]:
    held = _quantized.linear_prepack(per_row_int8(weight), bias)
    run = _quantized.linear_relu_dynamic if relu else _quantized.linear_dynamic
    return lambda x: run(x, held, False), weight.numel() + 4 * len(weight)
