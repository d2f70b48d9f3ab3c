"""Measures the candidates of one layer and decides."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tersetorch.conversion.baselines import Call, dense_forms, run_of
from tersetorch.conversion.cache import DecisionCache
from tersetorch.conversion.candidates import FACTORED, Candidate, density, weight_of
from tersetorch.conversion.machine import MachineFacts, is_busy
from tersetorch.conversion.report import NOT_TRIED, Trial
from tersetorch.conversion.swap import build
from tersetorch.conversion.timing import Contest, Timer, contest
from tersetorch.conversion.verify import compare
from tersetorch.conversion.walk import Site, label, why_not
from tersetorch.nn.shared_module import SharedModule


@dataclass(frozen=True)
class Decision:
    """What a layer, or the layers that use one weight, will run as.

    Attributes:
        chosen: "dense" or a format's name.
        reason: why, in words.
        layers: the replacements, one for each site; empty for "dense".
        signs: the format and layers that multiply signs, where they can stand in and were not chosen.
        ratio: time of the chosen candidate over the strongest dense form's.
        dense_form, dense_ms, noise, cached, trials: as in LayerReport.
    """

    chosen: str
    reason: str
    layers: list[nn.Module] = field(default_factory=list)
    ratio: float = 1.0
    dense_form: str | None = None
    dense_ms: float | None = None
    noise: float | None = None
    cached: bool = False
    trials: tuple[Trial, ...] = ()
    signs: tuple[str, list[nn.Module]] | None = None

    def undone(self, reason: str) -> Decision:
        """The same measurements, but dense."""
        return replace(self, chosen="dense", reason=reason, layers=[], ratio=1.0)


@dataclass(frozen=True)
class Planner:
    """Decides layer by layer.

    Attributes:
        table: the candidates.
        max_error: largest output difference allowed, as a share of the largest output; None: what rounding explains.
        seed: of the order of the rounds.
        timer: what measures.
        facts: the machine, for the cache's key.
        cache: earlier decisions, or None.
    """

    table: Mapping[str, Candidate]
    max_error: float | None
    seed: int
    timer: Timer
    facts: MachineFacts
    cache: DecisionCache | None

    def decide(self, sites: list[Site], inputs: list[list[Tensor] | str]) -> Decision:
        """Decides about sites, which use one weight, called with inputs, a list for each site.

        A candidate is verified before it is timed, and the one chosen is timed again on fresh rounds.
        """
        unusable = next((reason for reason in inputs if isinstance(reason, str)), None)
        if unusable is not None:
            return Decision("dense", unusable)
        calls = [(index, x) for index, seen in enumerate(inputs) for x in seen if isinstance(x, Tensor)]
        if not calls:
            return Decision("dense", "not reached by example_inputs")
        if not any(x.numel() for _, x in calls):
            return Decision("dense", "example_inputs gives it no rows to time it on")
        modules = [site.module for site in sites]
        with torch.no_grad():
            ready, trials = self._prepare(sites, calls)
            if not ready:
                reasons = "; ".join(f"{trial.format} {trial.reason}" for trial in trials.values())
                return Decision("dense", reasons, trials=tuple(trials.values()))
            key = self._key(modules, calls, ready)
            decision = self._recall(key, ready, trials)
            if decision is None:
                decision, final = self._measure(label(sites[0].name), modules, calls, ready, trials)
                if final and self.cache is not None:
                    self.cache.store(key, _record(decision))
        others = [(name, layers) for name, layers in ready.items() if self.table[name].signs]
        spare = None if decision.chosen in dict(others) else next(iter(others), None)
        return replace(decision, signs=spare)

    def _prepare(self, sites: list[Site], calls: list[Call]) -> tuple[dict[str, list[nn.Module]], dict[str, Trial]]:
        """The candidates' layers that may be timed, and what is known of every candidate so far."""
        modules = [site.module for site in sites]
        ready: dict[str, list[nn.Module]] = {}
        trials: dict[str, Trial] = {}
        share = density(weight_of(modules[0]))
        samples = samples_of(calls)
        for name, row in self.table.items():
            if any(type(module) is not row.source for module in modules):
                continue
            reason = row.fits(samples, self.max_error) or row.pays(modules[0]) or why_not(row, sites)
            if reason is None and share > row.max_density:
                reason = f"larger than the dense weight at density {share:.2f}"
            if reason is not None:
                trials[name] = Trial(name, f"{NOT_TRIED}: {reason}")
                continue
            try:
                layers = build(row, modules, samples)
                largest, refusal = self._verify(modules, layers, calls)
            except (RuntimeError, TypeError, ValueError) as error:
                trials[name] = Trial(name, f"refused: {type(error).__name__}: {error}")
                continue
            reason = "verified" if refusal is None else f"refused: {refusal}"
            trials[name] = Trial(name, reason, max_difference=largest if math.isfinite(largest) else None)
            if refusal is None:
                ready[name] = layers
        return ready, trials

    def _verify(self, modules: list[nn.Module], layers: list[nn.Module], calls: list[Call]) -> tuple[float, str | None]:
        largest = 0.0
        for index, x in calls:
            difference = compare(modules[index], layers[index], x, self.max_error)
            largest = max(largest, difference.largest)
            if difference.refusal is not None:
                return largest, difference.refusal
        return largest, None

    def _measure(
        self,
        name: str,
        modules: list[nn.Module],
        calls: list[Call],
        ready: dict[str, list[nn.Module]],
        trials: dict[str, Trial],
    ) -> tuple[Decision, bool]:
        """The decision, and whether it may be remembered: one that noise or a busy machine made may not."""
        dense = dense_forms(modules, calls)
        runs = {candidate: run_of(layers, calls) for candidate, layers in ready.items()}
        first = contest(dense, runs, seed=self.seed, timer=self.timer, label=f"{name}: ")
        for candidate in ready:
            trials[candidate] = _with_score(trials[candidate], first)
        outcome = Decision("dense", "", dense_form=first.dense_form, dense_ms=first.dense_ms, noise=first.noise)
        order = sorted(ready, key=lambda candidate: first.scores[candidate].ratio)
        for candidate in filter(first.passes, order):
            again = contest(
                dense, {candidate: runs[candidate]}, seed=self.seed + 1, timer=self.timer, label=f"{name}: "
            )
            if again.passes(candidate):
                reason = f"{first.describe(candidate)}; on fresh rounds {again.describe(candidate)}"
                ratio = again.scores[candidate].ratio
                chosen = replace(outcome, chosen=candidate, reason=reason, layers=ready[candidate], ratio=ratio)
                return replace(chosen, trials=tuple(trials.values())), not is_busy()
            reason = f"{trials[candidate].reason}; on fresh rounds {again.describe(candidate)}"
            trials[candidate] = replace(trials[candidate], reason=reason)
        best = order[0]
        decided = not is_busy() and not any(
            first.passes(candidate) or first.too_noisy(candidate) for candidate in ready
        )
        return replace(outcome, reason=f"{best} {trials[best].reason}", trials=tuple(trials.values())), decided

    def _key(self, modules: list[nn.Module], calls: list[Call], ready: dict[str, list[nn.Module]]) -> dict[str, Any]:
        weight = weight_of(modules[0])
        share = density(weight)
        return {
            "machine": dict(self.facts),
            "layers": [[type(module).__name__, module.extra_repr()] for module in modules],
            "weight": [list(weight.shape), list(weight.stride()), str(weight.dtype)],
            **({"factors": _shapes(modules[0])} if type(modules[0]) in FACTORED else {}),
            # In steps of a quarter: 1, 0.79, 0.63, 0.5, ...
            "density": round(-10 * math.log10(share)) if share else None,
            # Some layouts skip the zeros of x: their share, in tenths.
            "calls": [
                [index, list(x.shape), list(x.stride()), str(x.dtype), round(10 * density(x))] for index, x in calls
            ],
            "autocast": str(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else None,
            "max_error": self.max_error,
            # Of codes: how wide they are, and the sizes of what they look up.
            "candidates": {name: _sizes_of_codes(layers[0]) for name, layers in sorted(ready.items())},
        }

    def _recall(
        self, key: dict[str, Any], ready: dict[str, list[nn.Module]], trials: dict[str, Trial]
    ) -> Decision | None:
        if self.cache is None:
            return None
        record = self.cache.load(key)
        if record is None:
            return None
        try:
            return _from_record(record, ready, trials)
        except (KeyError, TypeError, ValueError) as error:
            self.cache.refuse(key, f"{type(error).__name__}: {error}")
            return None


def _sizes_of_codes(layer: nn.Module) -> list[list[int]]:
    if not isinstance(layer, SharedModule):
        return []
    return [list(layer.codes.shape), list(getattr(layer, layer.parameter_field).shape)]


def samples_of(calls: list[Call]) -> int:
    """The most samples that one of the calls multiplies at once."""
    # An index is a sample of its own.
    return max(x.numel() // max(1, x.shape[-1]) if x.is_floating_point() else x.numel() for _, x in calls)


def _shapes(module: nn.Module) -> list[list[int]]:
    return [list(parameter.shape) for parameter in module.parameters()]


def _with_score(trial: Trial, result: Contest) -> Trial:
    score = result.scores[trial.format]
    return replace(
        trial,
        reason=result.describe(trial.format),
        median_ms=score.median_ms,
        ratio=score.ratio,
        wins=score.wins,
        rounds=score.rounds,
    )


def _record(decision: Decision) -> dict[str, Any]:
    fields = ("chosen", "reason", "ratio", "dense_form", "dense_ms", "noise")
    timed = [asdict(trial) for trial in decision.trials if trial.median_ms is not None]
    return {name: getattr(decision, name) for name in fields} | {"trials": timed}


def _from_record(record: dict[str, Any], ready: Mapping[str, list[nn.Module]], trials: Mapping[str, Trial]) -> Decision:
    """The decision as recorded, with today's output differences: they belong to the weights, not to the machine."""
    fields = dict(record)
    merged = dict(trials)
    for data in fields.pop("trials"):
        trial = Trial(**data)
        merged[trial.format] = replace(trial, max_difference=trials[trial.format].max_difference)
    decision = Decision(**fields, cached=True, trials=tuple(merged.values()))
    if decision.chosen != "dense" and decision.chosen not in ready:
        raise ValueError(f"an unknown choice {decision.chosen!r}")
    return replace(decision, layers=list(ready.get(decision.chosen, [])))
