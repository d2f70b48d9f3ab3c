"""Times a converted model against the dense one and undoes swaps until it is faster, or dense."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from tersetorch.conversion import timing
from tersetorch.conversion.baselines import CONVOLUTIONS, in_channels_last, last_channels
from tersetorch.conversion.capture import Inputs, seeded_run, uncalled
from tersetorch.conversion.chains import fold
from tersetorch.conversion.fusion import OURS, Fusion, fuse
from tersetorch.conversion.planner import Decision, Planner
from tersetorch.conversion.report import ConversionReport
from tersetorch.conversion.swap import deep_copy, swapped_copy
from tersetorch.conversion.verify import output_difference
from tersetorch.conversion.walk import Site
from tersetorch.nn.sign_module import SignModule

# Where the model as a whole is not faster, this share of its swaps is undone before it is timed again.
UNDONE_SHARE = 0.25
# What a converted model is timed as: its dense convolutions' weights as they were, or in channels_last.
AS_IT_IS, CHANNELS_LAST = "converted model", "converted model in channels_last"


def assemble(
    model: nn.Module, groups: list[list[Site]], decisions: list[Decision], inputs: Inputs | None = None
) -> tuple[nn.Module, Fusion, dict[nn.Module, nn.Module]]:
    """A copy of model as decided, what became of its ReLUs and chains of signs, and what stands where in it.

    The replacements themselves go into it, but copies of layers of signs, which a chain changes. Where inputs are given
    and fused ReLUs change a bit of what comes out, none is fused; where chains do, there are none.
    """
    chosen = {
        site.module: layer
        for group, decision in zip(groups, decisions, strict=True)
        if decision.layers
        for site, layer in zip(group, decision.layers, strict=True)
    }
    if not chosen:
        return swapped_copy(model, {}), Fusion(), {}
    copied, signs, replacements = _chained(model, chosen, inputs)
    before = None if inputs is None else _output(copied, inputs)
    fusion = replace(fuse(copied, replacements.values()), signs=signs)
    if inputs is not None and (fusion.fused or fusion.in_place) and not _same(before, _output(copied, inputs)):
        for layer in replacements.values():
            if isinstance(layer, OURS):
                layer.relu = False
        copied, signs, replacements = _chained(model, chosen, inputs)
        return copied, Fusion(signs=signs), replacements
    return copied, fusion, replacements


def _chained(
    model: nn.Module, chosen: dict[nn.Module, nn.Module], inputs: Inputs | None
) -> tuple[nn.Module, dict[str, str], dict[nn.Module, nn.Module]]:
    """A copy of model with what was chosen, chains of signs made of it, what became of these, and what stands where."""
    replacements = _own_signs(chosen)
    copied = swapped_copy(model, replacements)
    if not any(isinstance(layer, SignModule) for layer in chosen.values()):
        return copied, {}, replacements
    before = None if inputs is None else _output(copied, inputs)
    signs = fold(copied, replacements.values())
    after = None if inputs is None else _output(copied, inputs)
    if inputs is not None and not _same(before, after):
        replacements = _own_signs(chosen)
        copied = swapped_copy(model, replacements)
        what = "changed the outputs for example_inputs"
        if isinstance(after, Exception):
            what = f"raised for example_inputs: {type(after).__name__}: {after}"
        signs = dict.fromkeys(signs, f"returns floats: as a chain it {what}")
    return copied, signs, replacements


def _own_signs(chosen: dict[nn.Module, nn.Module]) -> dict[nn.Module, nn.Module]:
    """The same with copies of layers of signs, which share what the originals share."""
    shared = [(module, layer) for module, layer in chosen.items() if isinstance(layer, SignModule)]
    copies = copy.deepcopy([layer for _, layer in shared])
    return chosen | {module: copied for (module, _), copied in zip(shared, copies, strict=True)}


def _output(model: nn.Module, inputs: Inputs) -> object:
    """What model gives in evaluation, or the error that it raises; a copy runs, since a run may change a model."""
    try:
        return seeded_run(deep_copy(model).eval(), inputs)
    except Exception as error:  # whatever the model raises
        return error


def _same(before: object, after: object) -> bool:
    if isinstance(before, Exception) or isinstance(after, Exception):
        return type(before) is type(after)
    return output_difference(before, after) in (0.0, None)


def settle(
    probe: nn.Module,
    inputs: Inputs,
    groups: list[list[Site]],
    decisions: list[Decision],
    reached: set[nn.Module],
    planner: Planner,
) -> tuple[list[Decision], ConversionReport]:
    """Times the whole model and undoes swaps until it is faster than dense, or dense.

    Args:
        probe: the dense model, in eval mode; the sites in groups are its own.
        inputs: what it is called with.
        groups: the sites that were decided together.
        decisions: one for each group.
        reached: the sites' modules that probe calls.
        planner: whose timer and seed are used.

    Returns:
        The decisions that stand, and the report's figures for the whole model.
    """
    decisions = _with_whole_chains(probe, inputs, groups, decisions, planner)
    if not any(decision.layers for decision in decisions):
        return decisions, _stays_dense("No layer is faster in another format: the model stays as it is.")
    # What a user who knows torch would run on a CPU.
    strong, given = {"dense model": probe}, {"dense model": inputs}
    if any(isinstance(module, CONVOLUTIONS) for module in reached):
        strong["dense model channels_last"] = in_channels_last(probe)
        given["dense model channels_last"] = inputs.map(last_channels)
    name, model = list(strong.items())[-1]
    in_place = deep_copy(model)
    if fuse(in_place, ()).in_place and _same(_output(model, given[name]), _output(in_place, given[name])):
        strong[f"{name} with ReLU in place"], given[f"{name} with ReLU in place"] = in_place, given[name]
    dense = {name: _runner(model, given[name].copy()) for name, model in strong.items()}
    verdict, dense_ms = "not timed", None
    while swapped := [index for index, decision in enumerate(decisions) if decision.layers]:
        converted, _, placed = assemble(probe, groups, decisions, inputs)
        watched = {placed[site.module]: index for index in swapped for site in groups[index] if site.module in reached}
        try:
            missing = {watched[layer] for layer in uncalled(converted, watched, inputs)}
        except Exception as error:  # whatever a model raises when it finds a layer it does not expect
            _undo(decisions, _weakest(decisions, swapped), f"undone: the model fails: {type(error).__name__}: {error}")
            continue
        if missing:
            _undo(decisions, missing, "undone: the model does not call the layer, but uses it in some other way")
            continue
        forms = {AS_IT_IS: converted}
        if any(isinstance(module, nn.Conv2d) for module in converted.modules()):
            # Its other convolutions then hand channels_last on, whatever they are given.
            forms[CHANNELS_LAST] = in_channels_last(converted)
        result = timing.contest(
            dense,
            {name: _runner(form, inputs.copy()) for name, form in forms.items()},
            seed=planner.seed,
            timer=planner.timer,
            label="the model: ",
        )
        best = min(forms, key=lambda name: (not result.passes(name), result.scores[name].ratio))
        verdict, dense_ms = result.describe(best), result.dense_ms
        if result.passes(best):
            score = result.scores[best]
            # Both from the same state, which the timed runs may have moved on.
            again, _, _ = assemble(probe, groups, decisions, inputs)
            again = in_channels_last(again) if best == CHANNELS_LAST else again
            expected, got = seeded_run(deep_copy(probe), inputs), seeded_run(again, inputs)
            return decisions, ConversionReport(
                layers=(),
                reason=f"The {best} is {verdict}.",
                memory_format="channels_last" if best == CHANNELS_LAST else None,
                dense_ms=result.dense_ms,
                converted_ms=score.median_ms,
                ratio=score.ratio,
                wins=score.wins,
                max_difference=output_difference(expected, got),
            )
        _undo(decisions, _weakest(decisions, swapped), f"undone: with it the whole model was {verdict}")
    reason = f"All swaps were undone and the model stays as it is; with the last ones it was {verdict}."
    return decisions, _stays_dense(reason, dense_ms)


def _with_whole_chains(
    probe: nn.Module, inputs: Inputs, groups: list[list[Site]], decisions: list[Decision], planner: Planner
) -> list[Decision]:
    """The decisions, with layers of signs that pay only as parts of a chain, where it is faster with them."""
    if not any(d.signs for d in decisions):
        return list(decisions)
    whole = [d if d.signs is None else replace(d, chosen=d.signs[0], layers=d.signs[1]) for d in decisions]
    forms = [assemble(probe, groups, each, inputs)[0] for each in (decisions, whole)]
    fails = any(isinstance(_output(form, inputs), Exception) for form in forms)
    if fails or _packing_layers(forms[0]) >= _packing_layers(forms[1]):
        return list(decisions)
    result = timing.contest(
        {"as decided": _runner(forms[0], inputs.copy())},
        {"whole": _runner(forms[1], inputs.copy())},
        seed=planner.seed,
        timer=planner.timer,
        label="the chains: ",
    )
    if not result.passes("whole"):
        return list(decisions)
    ratio, verdict = result.scores["whole"].ratio, result.describe("whole")
    return [
        d if d.signs is None else replace(w, ratio=ratio, reason=f"{d.reason}; chains with all such layers {verdict}")
        for d, w in zip(decisions, whole, strict=True)
    ]


def _packing_layers(model: nn.Module) -> int:
    return sum(isinstance(module, SignModule) and module.thresholds is not None for module in model.modules())


def _stays_dense(reason: str, dense_ms: float | None = None) -> ConversionReport:
    return ConversionReport((), reason, dense_ms=dense_ms, max_difference=0.0)


def _weakest(decisions: list[Decision], swapped: list[int]) -> list[int]:
    order = sorted(swapped, key=lambda index: -decisions[index].ratio)
    return order[: math.ceil(UNDONE_SHARE * len(order))]


def _undo(decisions: list[Decision], indices: Iterable[int], reason: str) -> None:
    for index in indices:
        decisions[index] = decisions[index].undone(reason)


def _runner(model: nn.Module, inputs: Inputs) -> timing.Run:
    return lambda: inputs.run(model)
