"""A model in, the same model out with the layers that run faster on this machine."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from tersetorch.conversion import timing
from tersetorch.conversion.baselines import in_channels_last
from tersetorch.conversion.cache import DecisionCache
from tersetorch.conversion.candidates import CANDIDATES, density, distinct_values
from tersetorch.conversion.capture import Inputs, capture, seeded_run, uncalled, untouched_generators
from tersetorch.conversion.chains import known_signs
from tersetorch.conversion.fusion import Fusion, unfused
from tersetorch.conversion.machine import load, machine_facts
from tersetorch.conversion.plan import follow
from tersetorch.conversion.planner import Decision, Planner, samples_of
from tersetorch.conversion.report import ConversionReport, LayerReport, attach
from tersetorch.conversion.swap import deep_copy, dense_again
from tersetorch.conversion.verify import output_difference
from tersetorch.conversion.walk import (
    Site,
    carries_hooks,
    current_format,
    find_sites,
    groups_of,
    inside_swapped,
    label,
    own_parameter,
)
from tersetorch.conversion.whole_model import assemble, settle
from tersetorch.methods import finalize
from tersetorch.methods.parametrization import is_live, release_graphs
from tersetorch.nn import SparseCodebookConv1d, SparseCodebookConv2d, SparseCodebookLinear
from tersetorch.nn.sign_module import PIXEL_INPUTS, SignModule

MULTIPLIED_OUT = "a factor of a layer that is multiplied out"
CODEBOOK_LAYERS = (SparseCodebookLinear, SparseCodebookConv2d, SparseCodebookConv1d)


def convert(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    plan: str | Mapping[str, str] | None = None,
    max_error: float | None = None,
    cache: bool = True,
    progress: bool = False,
    seed: int = 0,
) -> nn.Module:
    """A new model whose layers run in the format that is fastest on this machine, and never slower than before.

    A layer is replaced only if, on the inputs it really gets, in 15 interleaved rounds of random order against the
    strongest dense form (the layer itself, or its weight packed by oneDNN), its median ratio is at most 0.95, it wins
    at least 13, and its lead is larger than the difference of dense to itself; and again on fresh rounds. Then the
    whole model is timed in the same way against its dense form, and the weakest swaps are undone until it passes.
    Timing runs in eval mode, without gradients, with torch's current number of threads; grad mode apart, in the
    caller's context (autocast).

    model is left as it was, with its buffers, gradients, flags and the random generators. Methods that are still
    live are finalized in the copy, and layers that an earlier conversion built stay as they are. Training flags, but
    where layers of signs come in, shared modules and tied parameters carry over.

    A ReLU (nn.ReLU) that alone takes what a swapped layer returns becomes part of it, and an nn.Identity stands in its
    place; one that takes what a dense layer or batch normalisation returns overwrites it. Both need a model whose graph
    torch.fx can trace; outputs and gradients keep their bits. The dense model is timed with such ReLUs in place too.

    Between layers of signs ("binary_linear", "binary_conv2d") what stands before the next tersetorch.binarize.Sign, a
    batch norm and a max-pool, becomes integer thresholds that make the same decisions of the same sums, and packed
    signs flow; the report says of each such layer what it takes and returns, and why. A batch norm behind a layer that
    returns floats becomes its scale and bias where that changes no bit of any sum the layer can have. An nn.BatchNorm1d
    that goes so is taken to see [samples, features], and a flatten behind packed images batches: what would see
    something else raises a ValueError when it is called, and stays as it is where example_inputs show it. Layers of
    signs that alone are no faster are taken where they make chains longer and the model with them passes the same
    contest against that without.

    Layers of signs are for evaluation: they have no gradients ("binary_linear_real" and "binary_conv2d_real" have those
    of their input), and chains compute what the original computes there. So a model that gets such a layer is returned
    in eval mode, and the report says so where model is not; in train mode batch norms and dropouts that are left would
    go on training around them. Train model, and convert again.

    The factors of a layer of low rank (nn.LowRankLinear, LowRankConv2d, ClusteredConv2d) are layers like others. The
    whole layer is also tried as the plain one that its factors multiply out to ("multiplied_out"), which takes more
    memory and is faster where the factors are too many or too small; it is chosen before formats of the factors are
    looked at. A plain layer whose weight is a product already, up to rounding, becomes one of factors by name alone
    ("low_rank"), where these are smaller; what rank a weight may be given is for tt.factorize to decide.

    Where a model with convolutions is the fastest in channels_last, the result's dense convolutions hold their weights
    so, and hand that memory format on, whatever they are given; its outputs may then have other strides.

    Inside an nn.TransformerEncoderLayer a swap switches off the fast path. With src_key_padding_mask the outputs at
    padded positions, which that path sets to 0, then hold numbers, as they do in training.

    Args:
        model: any nn.Module.
        example_inputs: what model is called with: a tensor, a tuple of arguments or a dict of keyword arguments. With
            plan, only for the report's largest output difference.
        plan: "sparse", "codebook", "product", "residual", "binary", "fixed", "low_rank" or "multiplied_out", every
            layer that can; or format names by layer name, the others stay dense: "dense", "csr", "sparse_codebook",
            "sparse_conv2d" and the other names in tersetorch.conversion.candidates.CANDIDATES. "codebook" keeps codes
            of at most 8 bits, of a weight's non-zeros ("sparse_codebook") or of all its weights ("codebook_linear"),
            whichever takes fewer bytes: at 4 bits that of all from a tenth of non-zeros on; an nn.Embedding's are
            always those of all ("codebook_embedding"). "product" keeps codes of the sub-vectors that a weight's rows
            share, whoever made them ("product_linear", "product_conv2d"); "residual" those of the sums that
            quantize.residual made, as long as nobody changed the weight since ("residual_linear", "residual_conv2d").
            "binary" takes layers whose weights are +a and -a in each row: those whose input is signs, as the model's
            graph shows, and those of any input ("binary_linear_real", "binary_conv2d_real"). By name a first layer can
            also be told that its input is 8-bit images: "binary_linear_pixels" and "binary_conv2d_pixels" for k / 255,
            "binary_linear_signed_pixels" and "binary_conv2d_signed_pixels" for 2 k / 255 - 1; it takes the nearest k,
            and its batch norm becomes thresholds too. "fixed" takes layers whose formats quantize.fixed_formats chose,
            or that trained in fixed point ("fixed_linear", "fixed_conv2d"). Nothing is measured and max_error does not
            apply: these, and formats with int8 or bfloat16 in their name, round.
        max_error: largest |output difference| of a layer, as a share of its largest |output|; formats that round are
            tried then too. Default: what another order of summation explains (see
            tersetorch.conversion.verify.rounding_bound).
        cache: reuse and remember layer decisions in $TERSETORCH_CACHE, else in tersetorch in the user's cache
            directory. The whole model is timed in any case.
        progress: show a progress bar.
        seed: of the random order of the rounds.

    Raises:
        TypeError: an argument has another type.
        ValueError: an argument is out of range, plan does not fit model, or model cannot be copied or called.

    Source:
        The rules of tersetorch's design, "Never slower, defined".
    """
    _check_arguments(model, example_inputs, plan, max_error, cache, progress, seed)
    inputs = None if example_inputs is None else Inputs.of(example_inputs)
    # A copy made in the caller's inference mode could never train.
    with torch.inference_mode(False), untouched_generators():
        if is_live(model):
            release_graphs(model)
        finalized = finalize(deep_copy(model)) if is_live(model) else model
        layers, identities = unfused(finalized)
        source = dense_again(finalized, lambda layer: _stays_sparse(layer, layers), identities)
        if plan is not None:
            return _told(source, inputs, plan)
        assert inputs is not None
        remembered = DecisionCache() if cache else None
        planner = Planner(CANDIDATES, max_error, seed, timing.time_calls, machine_facts(), remembered)
        converted = _measured(source, inputs, planner, progress)
    if remembered is not None and remembered.problem is not None:
        warnings.warn(
            f"convert: the cache of decisions is not used: {remembered.problem}; delete it, set TERSETORCH_CACHE to "
            "another folder, or pass cache=False",
            RuntimeWarning,
            stacklevel=2,
        )
    return converted


def _stays_sparse(layer: nn.Module, unfused: set[nn.Module]) -> bool:
    """Whether a sparse layer has no dense form that surely takes the same inputs, or hooks or a ReLU that would go.

    A codebook is float32 whatever the model's dtype is; only the bias tells it.
    """
    bias = own_parameter(layer, "bias")
    if layer.relu and layer not in unfused:
        return True
    if carries_hooks(layer) or not isinstance(layer, CODEBOOK_LAYERS):
        return carries_hooks(layer)
    dense: Tensor = layer.to_dense().weight
    if bias is None:
        return torch.equal(dense.bfloat16().float(), dense)
    return dense.dtype != bias.dtype


def _told(source: nn.Module, inputs: Inputs | None, plan: str | Mapping[str, str]) -> nn.Module:
    sites = known_signs(source, find_sites(source, CANDIDATES))
    groups = groups_of(sites)
    seen = _seen(source, groups, inputs)
    samples = [samples_of([(0, x) for x in xs]) if xs else None for xs in seen]
    decisions = follow(plan, sites, groups, CANDIDATES, samples)
    decisions = [replace(d, reason=d.reason + _pixels(d, xs)) for d, xs in zip(decisions, seen, strict=True)]
    gone = inside_swapped(groups, [bool(decision.layers) for decision in decisions])
    decisions = [d.undone(MULTIPLIED_OUT) if inside else d for d, inside in zip(decisions, gone, strict=True)]
    converted, fusion, _ = assemble(source, groups, decisions, inputs)
    difference = None
    if inputs is not None:
        bypassed = _bypassed(source, converted, groups, decisions, inputs)
        if bypassed:
            reason = "undone: the model does not call the layer, but uses it in some other way"
            decisions = [d.undone(reason) if index in bypassed else d for index, d in enumerate(decisions)]
            converted, fusion, _ = assemble(source, groups, decisions, inputs)
        dense, sparse = deep_copy(source).eval(), deep_copy(converted).eval()
        difference = output_difference(seeded_run(dense, inputs), seeded_run(sparse, inputs))
    conversion = ConversionReport(
        _layer_reports(sites, groups, decisions, fusion),
        "Told by plan: nothing was measured." + _stilled(converted, decisions),
        max_difference=difference,
        in_place=fusion.in_place,
    )
    attach(converted, conversion)
    return converted


def _stilled(converted: nn.Module, decisions: list[Decision]) -> str:
    """Puts a model that got layers of signs in eval mode; what the report says of that, or nothing."""
    training = any(module.training for module in converted.modules())
    if not training or not any(isinstance(layer, SignModule) for d in decisions for layer in d.layers):
        return ""
    converted.eval()
    return " It is in eval mode, though the original is in train mode: layers of signs do not train."


def _pixels(decision: Decision, seen: list[Tensor]) -> str:
    """What the reason of layers of 8-bit pixels says of inputs that are none, or nothing."""
    layer = next((layer for layer in decision.layers if isinstance(layer, SignModule)), None)
    if layer is None or layer.inputs not in PIXEL_INPUTS:
        return ""
    floats = [x for x in seen if x.is_floating_point() and x.numel()]
    if not floats:
        return ""
    distance = float(torch.tensor([layer.off_pixels(x) for x in floats]).max())
    # As far as rounding puts k / 255, or (k / 255 - 0.5) / 0.5.
    if distance <= 8 * torch.finfo(floats[0].dtype).eps:
        return ""
    level = "k / 255" if layer.inputs == "pixels" else "2 k / 255 - 1"
    return f"; its example_inputs are no 8-bit images: up to {distance:.3g} from the nearest {level}"


def _seen(source: nn.Module, groups: list[list[Site]], inputs: Inputs | None) -> list[list[Tensor]]:
    """What the layers of each group are called with, where inputs reach them."""
    if inputs is None:
        return [[] for _ in groups]
    probe = deep_copy(source).eval()
    _run(probe, inputs)
    twins = [[probe.get_submodule(site.name) for site in group] for group in groups]
    calls = capture(probe, [module for group in twins for module in group], inputs)
    called = [[calls[module] for module in group] for group in twins]
    return [[x for xs in group if not isinstance(xs, str) for x in xs] for group in called]


def _bypassed(
    source: nn.Module, converted: nn.Module, groups: list[list[Site]], decisions: list[Decision], inputs: Inputs
) -> set[int]:
    """The groups with a layer that source calls and converted does not."""
    names = {site.name: index for index, group in enumerate(groups) if decisions[index].layers for site in group}

    def unreached(model: nn.Module) -> set[str]:
        copied = deep_copy(model).eval()
        by_module = {copied.get_submodule(name): name for name in names}
        return {by_module[module] for module in uncalled(copied, by_module, inputs)}

    return {names[name] for name in unreached(converted) - unreached(source)}


def _measured(source: nn.Module, inputs: Inputs, planner: Planner, progress: bool) -> nn.Module:
    probe = deep_copy(source).eval()
    sites = known_signs(probe, find_sites(probe, planner.table))
    groups = groups_of(sites)
    # A first run says whether the model can be called at all, and fills what it allocates on its first call.
    _run(probe, inputs)
    calls = capture(probe, [site.module for group in groups for site in group], inputs)
    decisions: list[Decision] = []
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("convert", total=len(groups) + 1)
        for group in groups:
            bar.update(task, description=f"convert {label(group[0].name)}")
            # A layer comes before its factors.
            swapped = [bool(decision.layers) for decision in decisions]
            if inside_swapped(groups[: len(swapped) + 1], [*swapped, False])[-1]:
                decisions.append(Decision("dense", MULTIPLIED_OUT))
            else:
                decisions.append(planner.decide(group, [calls[site.module] for site in group]))
            bar.advance(task)
        bar.update(task, description="convert: the whole model")
        reached = {module for module, seen in calls.items() if seen}
        calls.clear()
        decisions, conversion = settle(probe, inputs, groups, decisions, reached, planner)
        bar.advance(task)
    by_name = [[replace(site, module=source.get_submodule(site.name)) for site in group] for group in groups]
    converted, fusion, _ = assemble(source, by_name, decisions, inputs)
    if conversion.memory_format is not None:
        converted = in_channels_last(converted)
    layers = _layer_reports(sites, groups, decisions, fusion)
    machine = {**planner.facts, "load": load()}
    reason = conversion.reason + _stilled(converted, decisions)
    found = replace(conversion, layers=layers, reason=reason, in_place=fusion.in_place, machine=machine)
    attach(converted, found)
    return converted


def _run(model: nn.Module, inputs: Inputs) -> object:
    try:
        return inputs.copy().run(model)
    except Exception as error:  # whatever the model raises
        raise ValueError(
            f"convert: example_inputs must be what the model is called with, got {type(error).__name__}: {error}; "
            "pass a tensor, a tuple of arguments or a dict of keyword arguments that model takes in eval mode"
        ) from error


def _layer_reports(
    sites: list[Site], groups: list[list[Site]], decisions: list[Decision], fusion: Fusion
) -> tuple[LayerReport, ...]:
    by_group = {group[0].group: decision for group, decision in zip(groups, decisions, strict=True)}
    reports = []
    for site in sites:
        weight = own_parameter(site.module, "weight")
        counted = None if weight is None or site.kept is not None else weight.detach()
        decision = (
            by_group[site.group] if site.kept is None else Decision(current_format(site.module, CANDIDATES), site.kept)
        )
        reports.append(
            LayerReport(
                name=site.name,
                names=site.names,
                kind=type(site.module).__name__,
                shape=() if weight is None else tuple(weight.shape),
                density=None if counted is None else density(counted),
                distinct=None if counted is None else distinct_values(counted),
                chosen=decision.chosen,
                reason="; ".join([decision.reason, *(fusion.signs[n] for n in site.names if n in fusion.signs)]),
                relu=next((fusion.fused[name] for name in site.names if name in fusion.fused), None),
                dense_form=decision.dense_form,
                dense_ms=decision.dense_ms,
                noise=decision.noise,
                cached=decision.cached,
                trials=decision.trials,
            )
        )
    return tuple(reports)


def _check_arguments(
    model: object,
    example_inputs: object,
    plan: object,
    max_error: object,
    cache: object,
    progress: object,
    seed: object,
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be an nn.Module, got {type(model).__name__}; pass the model itself")
    # Nobody can hold a compiled module before this is imported, and importing it takes seconds.
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and any(isinstance(module, dynamo.OptimizedModule) for module in model.modules()):
        raise ValueError(
            "convert: model must be eager, got one that went through torch.compile; convert the original and compile "
            "the result"
        )
    tensors = (*model.named_parameters(), *model.named_buffers())
    lazy = [name for name, tensor in tensors if isinstance(tensor, UninitializedParameter | UninitializedBuffer)]
    if lazy:
        raise ValueError(f"convert: model must be initialised, got {lazy[0]!r} without a shape; run the model once")
    if example_inputs is None and plan is None:
        raise ValueError(
            "convert: example_inputs must be given unless plan is, got None; pass a batch the model takes, "
            "or plan='sparse'"
        )
    if isinstance(max_error, bool) or not isinstance(max_error, int | float | None):
        raise TypeError(f"convert: max_error must be a number or None, got {type(max_error).__name__}; pass 1e-3")
    if max_error is not None and not 0 <= max_error < math.inf:
        raise ValueError(f"convert: max_error must be finite and at least 0, got {max_error}; pass 1e-3")
    for name, flag in (("cache", cache), ("progress", progress)):
        if not isinstance(flag, bool):
            raise TypeError(f"convert: {name} must be True or False, got {flag!r}; pass a bool")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"convert: seed must be an integer, got {type(seed).__name__}; pass 0")
    if seed < 0:
        raise ValueError(f"convert: seed must be at least 0, got {seed}; pass 0")
