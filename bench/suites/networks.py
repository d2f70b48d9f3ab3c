"""Whole pruned networks: dense in torch's better layout, and what convert makes of them."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tersetorch import _native, conversion, costs, zoo
from tersetorch.conversion.fusion import fuse

from ..implementations import LeftOut, max_error_of, refusal
from ..options import Options
from ..rates import Rates
from ..timing import interleave

SECONDS, QUICK_SECONDS = 4.0, 0.5
IN_PLACE = "torch dense channels_last, ReLU in place"
NAMES = (
    "torch dense",
    "torch dense channels_last",
    IN_PLACE,
    "tersetorch convert",
    "tersetorch convert channels_last",
)


@dataclass(frozen=True)
class Network:
    """A pruned network: how it is built from the folder TERSETORCH_DATA, and the shape of one input."""

    name: str
    build: Callable[[Path], nn.Module]
    files: tuple[str, ...]
    input_shape: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """One network with one batch."""

    network: Network
    batch: int

    @property
    def label(self) -> str:
        """One line for a person."""
        return f"{self.network.name}, batch {self.batch}"


def _surgery(folder: Path) -> nn.Module:
    state = load_file(folder / "models/lenet300100-dns.safetensors")
    model = zoo.LeNet300100()
    names = {"ip1": "fc1", "ip2": "fc2", "ip3": "fc3"}
    model.load_state_dict({f"{names[key.split('.')[0]]}.{key.split('.')[1]}": value for key, value in state.items()})
    return model.eval()


def _squeezenet(folder: Path) -> nn.Module:
    return zoo.squeezenet_from_deep_compression(folder / "models/squeezenet-deep-compression.net")


NETWORKS = (
    Network("SqueezeNet of Deep Compression", _squeezenet, ("models/squeezenet-deep-compression.net",), (3, 227, 227)),
    Network("LeNet-300-100 of Dynamic Surgery", _surgery, ("models/lenet300100-dns.safetensors",), (784,)),
)


def groups(options: Options) -> list[Group]:
    """The networks whose files are in TERSETORCH_DATA."""
    folder = Path(os.environ.get("TERSETORCH_DATA", ""))
    batches = options.batches or ((1,) if options.quick else (1, 16))
    return [
        Group(network, batch)
        for network in NETWORKS
        if options.takes_case(network.name) and all((folder / file).is_file() for file in network.files)
        for batch in batches
    ]


class Networks:
    """Measures groups. Outputs are compared with the dense network in float64 before anything is timed."""

    def __init__(self, options: Options, rates: Rates) -> None:
        self._options = options
        self._rates = rates

    def measure(self, group: Group) -> tuple[list[dict[str, Any]], list[LeftOut]]:
        """The records of a group, and what was left out."""
        dense = group.network.build(Path(os.environ["TERSETORCH_DATA"]))
        x = torch.randn(group.batch, *group.network.input_shape, generator=torch.Generator().manual_seed(1))
        packed: dict[str, tuple[nn.Module, Tensor, float]] = {}
        for name in NAMES:
            if not self._options.takes(name, name.startswith("tersetorch")):
                continue
            model, samples = dense, x
            start = time.perf_counter()
            if "channels_last" in name:
                if x.dim() != 4:
                    continue
                model = nn.Module.to(copy.deepcopy(dense), memory_format=torch.channels_last)  # type: ignore[call-overload]
                samples = x.to(memory_format=torch.channels_last)
            if name == IN_PLACE:
                fuse(model, ())
            if name.startswith("tersetorch"):
                model = conversion.convert(model, samples)
            packed[name] = model, samples, 1e3 * (time.perf_counter() - start)
        with torch.inference_mode():
            return self._time(group, dense, x, packed)

    def _time(
        self, group: Group, dense: nn.Module, x: Tensor, packed: dict[str, tuple[nn.Module, Tensor, float]]
    ) -> tuple[list[dict[str, Any]], list[LeftOut]]:
        want = copy.deepcopy(dense).double()(x.double())
        errors, left_out = {}, []
        for name, (model, samples, _) in list(packed.items()):
            errors[name] = max_error_of(model(samples), want)
            wrong = refusal(errors[name], "float32")
            if wrong:
                left_out.append(LeftOut(name, group.label, wrong, wrong=True))
                del packed[name]
        if not packed:
            return [], left_out
        calls = {name: (lambda m=model, s=samples: m(s)) for name, (model, samples, _) in packed.items()}
        times = interleave(calls, QUICK_SECONDS if self._options.quick else SECONDS)
        count = costs.count(dense, x[:1])
        density = count.nonzeros / count.parameters
        records = []
        for name, (model, _, pack_ms) in packed.items():
            ours = name.startswith("tersetorch")
            operations = 2 * group.batch * (sum(layer.effective_macs for layer in count.layers) if ours else count.macs)
            nbytes = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
            limit_ms, bound = self._rates.limit_ms(
                operations, nbytes, "float32", _native.cpu_active() if ours else _native.cpu_detected(), False
            )
            record: dict[str, Any] = {
                "suite": "networks",
                "case": group.network.name,
                "kind": "network",
                "shape": list(group.network.input_shape),
                "density": density,
                "pattern": "trained",
                "batch": group.batch,
                "active": 1.0,
                "cache": "warm",
                "threads": self._options.threads,
                "isa": _native.cpu_active(),
                "implementation": name,
                "family": "ours" if ours else "dense",
                "mode": "float32",
                "pack_ms": pack_ms,
                "weight_bytes": nbytes,
                "bytes": nbytes,
                "ops": operations,
                "limit_ms": limit_ms,
                "limit": bound,
                "fraction_of_limit": limit_ms / times[name]["p30_ms"],
                "max_error": errors[name],
                **times[name],
            }
            if ours:
                record["chosen"] = {
                    layer.name: layer.chosen for layer in conversion.report(model).layers if layer.chosen != "dense"
                }
            records.append(record)
        return records, left_out
