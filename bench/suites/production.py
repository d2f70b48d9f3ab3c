"""Networks in use: compiled and packaged, called from several threads, and loaded from a file.

Weights are drawn with the published densities of each layer. Whatever a form returns is compared with the dense network
in float64 before it is timed.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersetorch import _native, conversion, costs, storage

from ..implementations import LeftOut, max_error_of, refusal
from ..options import Options
from ..production_forms import Call, compiled, from_threads, frozen, packaged
from ..production_networks import ALEXNET_STACK, LENET_300_100, NETWORKS, Network
from ..rates import Rates
from ..timing import interleave

COMPILED, CALLED, LOADED = "compiled", "called from threads", "loaded"
SECONDS, QUICK_SECONDS = 0.4, 0.05  # for each form, and for each window
LOADING_SECONDS = 3.0
WINDOWS, QUICK_WINDOWS = 7, 3
# Of a model called "dense" or "convert"; the eager one goes without a suffix.
SUFFIXES = ("", " compiled", " compiled, frozen", " AOTInductor, frozen")
# What the stack becomes for few samples and for more: formats by name, as convert chooses among more.
FEW = 4
PLANS = {
    "tersetorch sparse": ("csr16", "blocked"),
    "tersetorch sparse codebook": ("csr16_codebook", "blocked_codebook"),
    "tersetorch codebook, 4 bits": ("codebook_linear", "codebook_linear"),
}
CODED = "tersetorch codebook, 4 bits"


@dataclass(frozen=True)
class Group:
    """One network with one batch, and what is done with it."""

    network: Network
    batch: int
    pattern: str

    @property
    def label(self) -> str:
        """One line for a person."""
        return f"{self.network.name} {self.pattern}, batch {self.batch}"


def groups(options: Options) -> list[Group]:
    """Networks to compile for any number of threads, to load with one thread, and to call from two and more."""
    asked: list[tuple[str, tuple[Network, ...], tuple[int, ...]]] = []
    if shutil.which(os.environ.get("CXX", "g++")):
        asked.append((COMPILED, NETWORKS[: 1 if options.quick else None], (1,)))
    if options.threads > 1:
        asked.append((CALLED, (ALEXNET_STACK,), (1,) if options.quick else (1, 16)))
    else:
        asked.append((LOADED, (LENET_300_100, ALEXNET_STACK)[: 1 if options.quick else None], (1,)))
    found = [
        Group(network, batch, pattern)
        for pattern, networks, batches in asked
        for network in networks
        for batch in options.batches or batches
    ]
    return [group for group in found if options.takes_case(group.label)]


@dataclass(frozen=True)
class _Form:
    """What is timed, the bytes of its weights, how long it took to make, and what its records say besides."""

    call: Callable[[], Any]
    nbytes: int
    pack_ms: float
    error: float
    more: dict[str, Any]


class Production:
    """Measures groups.

    A record's milliseconds are, by its pattern: of a call; of the time in which callers finish a call, all together;
    from a file to the first output. limit_ms is that of all threads of the run. "callers" is how many threads call,
    "file_bytes" the size of a file that is loaded, "chosen" what convert made of each layer.
    """

    def __init__(self, options: Options, rates: Rates) -> None:
        self._options = options
        self._rates = rates

    def measure(self, group: Group) -> tuple[list[dict[str, Any]], list[LeftOut]]:
        """The records of a group, and what was left out."""
        measure = {COMPILED: self._compiled, CALLED: self._called, LOADED: self._loaded}[group.pattern]
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            return measure(group, Path(folder))

    # ---- compiled

    def _compiled(self, group: Group, folder: Path) -> tuple[list[dict[str, Any]], list[LeftOut]]:
        dense, x = group.network.pruned(), group.network.samples(group.batch)
        want = _reference(dense, x)
        forms: dict[str, _Form] = {}
        left_out: list[LeftOut] = []
        for name in ("torch dense", "tersetorch convert"):
            ours = name.startswith("tersetorch")
            if not any(self._options.takes(name + suffix, ours) for suffix in SUFFIXES):
                continue
            model, convert_ms = _timed(partial(conversion.convert, dense, x)) if ours else (dense, 0.0)
            more = {"chosen": _chosen(model)} if ours else {}
            torch.compiler.reset()
            makers: tuple[Callable[[], Call], ...] = (
                partial(_same, model),
                partial(compiled, model, x),
                partial(frozen, model, x),
                partial(packaged, model, x, folder),
            )
            for suffix, make in zip(SUFFIXES, makers, strict=True):
                if not self._options.takes(name + suffix, ours):
                    continue
                call, compile_ms = _timed(make)
                error = max_error_of(call(x), want)
                form = _Form(partial(call, x), _nbytes(model), convert_ms + compile_ms, error, more)
                _keep(forms, left_out, group, name + suffix, form)
        seconds = QUICK_SECONDS if self._options.quick else SECONDS
        times = interleave({name: form.call for name, form in forms.items()}, seconds * len(forms)) if forms else {}
        return [self._record(group, dense, name, form, times[name]) for name, form in forms.items()], left_out

    # ---- called from threads

    def _called(self, group: Group, _: Path) -> tuple[list[dict[str, Any]], list[LeftOut]]:
        pruned, x = group.network.pruned(), group.network.samples(group.batch)
        coded = group.network.coded(4)
        threads = self._options.threads
        models: dict[str, tuple[nn.Module, float, Tensor]] = {}
        if self._options.takes("torch dense", False):
            models["torch dense"] = pruned, 0.0, _reference(pruned, x)
        for name, plans in PLANS.items():
            if self._options.takes(name, True):
                dense = coded if name == CODED else pruned
                plan = dict.fromkeys(group.network.densities, plans[group.batch >= FEW])
                model, pack_ms = _timed(partial(conversion.convert, dense, plan=plan))
                models[name] = model, pack_ms, _reference(dense, x)
        forms: dict[str, _Form] = {}
        left_out: list[LeftOut] = []
        for name, (model, pack_ms, want) in models.items():
            error = max(max_error_of(y, want) for y in _together(model, x, threads))
            form = _Form(partial(model, x), _nbytes(model), pack_ms, error, {})
            _keep(forms, left_out, group, name, form)
        quick = self._options.quick
        try:
            times = from_threads(
                {name: form.call for name, form in forms.items()},
                tuple(range(1, threads + 1)),
                QUICK_WINDOWS if quick else WINDOWS,
                QUICK_SECONDS if quick else SECONDS,
            )
        finally:
            torch.set_num_threads(threads)  # callers have said 1, which is global in part
        records = []
        for (name, callers), found in times.items():
            record = self._record(group, pruned, name, forms[name], found)
            records.append(record | {"threads": callers, "callers": callers})
        return records, left_out

    # ---- loaded

    def _loaded(self, group: Group, folder: Path) -> tuple[list[dict[str, Any]], list[LeftOut]]:
        dense, x = group.network.pruned(), group.network.samples(group.batch)
        want = _reference(dense, x)
        plan = dict.fromkeys(group.network.densities, PLANS["tersetorch sparse codebook"][group.batch >= FEW])
        state, file = folder / "dense.pt", folder / "converted.terse"
        torch.save(dense.state_dict(), state)
        converted, pack_ms = _timed(lambda: conversion.convert(dense, plan=plan))
        storage.save(converted, file)

        def load_state() -> nn.Module:
            with torch.device("meta"):
                model = group.network.build().eval()
            model.load_state_dict(torch.load(state, mmap=True), assign=True)
            return model

        loads: dict[str, tuple[Callable[[], nn.Module], Path]] = {
            "torch.load, dense": (load_state, state),
            "torch.load, then convert": (lambda: conversion.convert(load_state(), plan=plan), state),
            "tersetorch load": (lambda: storage.load(file), file),
        }
        forms: dict[str, _Form] = {}
        left_out: list[LeftOut] = []
        for name, (load, path) in loads.items():
            if self._options.takes(name, name.startswith("tersetorch")):
                model = load()
                form = _Form(
                    partial(_first_output, load, x),
                    _nbytes(model),
                    pack_ms,
                    max_error_of(model(x), want),
                    {"file_bytes": path.stat().st_size},
                )
                _keep(forms, left_out, group, name, form)
        seconds = QUICK_SECONDS if self._options.quick else LOADING_SECONDS
        times = interleave({name: form.call for name, form in forms.items()}, seconds * len(forms)) if forms else {}
        return [self._record(group, dense, name, form, times[name]) for name, form in forms.items()], left_out

    # ---- all

    def _record(
        self, group: Group, dense: nn.Module, name: str, form: _Form, times: dict[str, float]
    ) -> dict[str, Any]:
        ours = name.startswith("tersetorch")
        count = costs.count(dense, group.network.samples(1))
        operations = 2 * group.batch * (sum(layer.effective_macs for layer in count.layers) if ours else count.macs)
        moved = form.nbytes + form.more.get("file_bytes", 0)
        level = _native.cpu_active() if ours else _native.cpu_detected()
        limit_ms, bound = self._rates.limit_ms(operations, moved, "float32", level, False)
        return {
            "suite": "production",
            "case": group.network.name,
            "kind": "network",
            "shape": list(group.network.input_shape),
            "density": count.nonzeros / count.parameters,
            "pattern": group.pattern,
            "batch": group.batch,
            "active": 1.0,
            "cache": "warm",
            "threads": self._options.threads,
            "isa": _native.cpu_active(),
            "implementation": name,
            "family": "ours" if ours else "dense",
            "mode": "float32",
            "pack_ms": form.pack_ms,
            "weight_bytes": form.nbytes,
            "bytes": moved,
            "ops": operations,
            "limit_ms": limit_ms,
            "limit": bound,
            "fraction_of_limit": limit_ms / times["p30_ms"],
            "max_error": form.error,
            **times,
            **form.more,
        }


def _keep(forms: dict[str, _Form], left_out: list[LeftOut], group: Group, name: str, form: _Form) -> None:
    wrong = refusal(form.error, "float32")
    if wrong:
        left_out.append(LeftOut(name, group.label, wrong, wrong=True))
    else:
        forms[name] = form


def _same(model: nn.Module) -> nn.Module:
    return model


def _first_output(load: Callable[[], nn.Module], x: Tensor) -> Tensor:
    y: Tensor = load()(x)
    return y


def _reference(dense: nn.Module, x: Tensor) -> Tensor:
    want: Tensor = copy.deepcopy(dense).double()(x.double())
    return want


def _together(model: nn.Module, x: Tensor, callers: int) -> list[Tensor]:
    """What several threads that call at once get."""

    def one(_: int) -> Tensor:
        with torch.inference_mode():
            y: Tensor = model(x)
            return y

    with ThreadPoolExecutor(callers) as pool:
        return list(pool.map(one, range(4 * callers)))


def _timed(make: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    made = make()
    return made, 1e3 * (time.perf_counter() - start)


def _nbytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _chosen(model: nn.Module) -> dict[str, str]:
    return {layer.name: layer.chosen for layer in conversion.report(model).layers if layer.chosen != "dense"}
