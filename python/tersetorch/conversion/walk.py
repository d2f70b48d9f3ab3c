"""Which layers of a model may be swapped, and why the others may not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersetorch.conversion.candidates import FACTORED, Candidate
from tersetorch.nn.sign_module import SignModule

# Modules whose own forward reads a child's weight instead of calling the child.
READS_CHILD_WEIGHTS = (nn.MultiheadAttention,)
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Site:
    """A layer with a weight.

    Attributes:
        names: every path that leads to it; more than one for a shared module, "" for the model itself.
        module: the layer.
        kept: why it must stay as it is, or None.
        group: sites with the same number use the same weight, so they are swapped together or not at all.
        unsigned: why its input is not known to be signs, +1 and -1, in evaluation; None where it is.
    """

    names: tuple[str, ...]
    module: nn.Module
    kept: str | None
    group: int
    unsigned: str | None = "its input is not known to be signs"

    @property
    def name(self) -> str:
        """The first path."""
        return self.names[0]


def find_sites(model: nn.Module, table: Mapping[str, Candidate]) -> list[Site]:
    """Every module of model that owns a weight matrix, in the model's order, each once."""
    names: dict[nn.Module, list[str]] = defaultdict(list)
    parents: dict[nn.Module, list[nn.Module]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(name)
    for module in names:
        for child in module._modules.values():
            if child is not None:
                parents[child].append(module)
    layers = [module for module in names if _has_weight(module, table)]
    overlaps = _overlapping_weights(names)
    sites = [
        Site(tuple(names[module]), module, _why_kept(module, parents[module], table) or overlaps.get(module), index)
        for index, module in enumerate(layers)
    ]
    return _tie(sites, names)


def groups_of(sites: Iterable[Site]) -> list[list[Site]]:
    """The sites that may be swapped, grouped by the weight they use."""
    groups: dict[int, list[Site]] = defaultdict(list)
    for site in sites:
        if site.kept is None:
            groups[site.group].append(site)
    return list(groups.values())


def why_not(row: Candidate, group: list[Site]) -> str | None:
    """Why sites that use one weight cannot run as a candidate for their class, or None."""
    unsigned = next((site.unsigned for site in group if site.unsigned is not None), None) if row.signs else None
    return row.applies(group[0].module) or unsigned


def inside_swapped(groups: list[list[Site]], swapped: Iterable[bool]) -> list[bool]:
    """Which groups have a site inside one of another group that is swapped, and so go with it."""
    gone = {
        inner
        for group, goes in zip(groups, swapped, strict=True)
        for site in group
        for inner in site.module.modules()
        if goes and inner is not site.module
    }
    return [any(site.module in gone for site in group) for group in groups]


def carries_hooks(module: nn.Module) -> bool:
    """Whether a swap of module would lose hooks."""
    return any(getattr(module, hooks) for hooks in HOOKS)


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter that module itself registers under name, if any."""
    # The members of a ScriptModule can be listed, but not looked up.
    return dict(module._parameters.items()).get(name)


def weight_name(module: nn.Module) -> str:
    """The parameter that is module's weight, or stands for it."""
    name: str = getattr(type(module), "weight_parameter", "weight")
    return name


def current_format(module: nn.Module, table: Mapping[str, Candidate]) -> str:
    """What module runs as today: a format's name for a layer that convert built, otherwise "dense"."""
    layout = getattr(module, "layout", "csr")
    formats = (name for name, row in table.items() if type(module) is row.layer and layout == row.layout)
    return next(formats, "dense")


def label(name: str) -> str:
    """A path as a person reads it."""
    return name or "(the model)"


def _has_weight(module: nn.Module, table: Mapping[str, Candidate]) -> bool:
    weight = own_parameter(module, weight_name(module))
    return (
        (weight is not None and weight.dim() >= 2)
        or isinstance(module, tuple({row.source for row in table.values()} | {row.layer for row in table.values()}))
        or _is_quantized(module)
    )


def _is_quantized(module: nn.Module) -> bool:
    # torch.ao's quantised layers answer weight() instead of holding a parameter.
    return callable(getattr(type(module), "weight", None))


def _why_kept(module: nn.Module, parents: list[nn.Module], table: Mapping[str, Candidate]) -> str | None:
    kind = type(module)
    weight = own_parameter(module, weight_name(module))
    if isinstance(module, SignModule):
        return f"already a {kind.__name__}"
    if current_format(module, table) != "dense":
        return f"already a {kind.__name__}, with hooks, a ReLU or mixed dtypes, which its dense form would lose"
    if _is_quantized(module):
        return f"the weight of a {kind.__name__} is a method: it is quantised"
    for parent in parents:
        if isinstance(parent, READS_CHILD_WEIGHTS):
            return f"its parent {type(parent).__name__} reads its weight instead of calling it"
    if parametrize.is_parametrized(module):
        return "parametrized by other code; call torch.nn.utils.parametrize.remove_parametrizations first"
    if kind not in {row.source for row in table.values()}:
        bases = [row.source.__name__ for row in table.values() if isinstance(module, row.source)]
        if bases:
            return f"{kind.__name__} is a subclass of {bases[0]}, which may compute something else"
        return f"no format runs a {kind.__name__}"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if carries_hooks(module):
        return "it carries hooks, which a swap would lose; remove them first"
    if kind in FACTORED:
        return _why_factors_kept(module)
    if weight is None:
        return "its weight is not a parameter"
    return _why_weight_kept(weight)


def _why_factors_kept(module: nn.Module) -> str | None:
    """Why a layer's factors must not be multiplied out, or None."""
    for name, factor in module.named_children():
        if type(factor) not in (nn.Linear, nn.Conv2d):
            return f"its factor {name} is a {type(factor).__name__}, which stays as it is"
        weight = own_parameter(factor, "weight")
        if carries_hooks(factor) or "forward" in vars(factor) or weight is None:
            return f"its factor {name} carries hooks or a forward of its own, which would be lost"
        reason = _why_weight_kept(weight)
        if reason is not None:
            return f"of its factor {name}: {reason}"
    return None


def _why_weight_kept(weight: Tensor) -> str | None:
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, not a plain tensor"
    if weight.device.type != "cpu":
        return f"its weight is on {weight.device}, and the kernels run on cpu"
    if weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}, and the kernels take float32 and bfloat16"
    if weight.layout != torch.strided:
        return f"its weight has layout {weight.layout}"
    if weight.numel() == 0:
        return "its weight is empty"
    if not bool(torch.stack(weight.detach().aminmax()).isfinite().all()):
        return "its weight holds NaN or infinity"
    return None


def _has_memory(tensor: Tensor) -> bool:
    plain = type(tensor) in (nn.Parameter, Tensor) and tensor.layout == torch.strided
    return plain and tensor.device.type != "meta" and tensor.numel() > 0


def _overlapping_weights(names: Mapping[nn.Module, list[str]]) -> dict[nn.Module, str]:
    """The modules whose weight shares memory with another tensor of the model, other than by being the same one."""
    spans = []
    for module, paths in names.items():
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or not _has_memory(tensor):
                continue
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            end = start + (last + 1) * tensor.element_size()
            path = f"{paths[0]}.{attribute}".removeprefix(".")
            spans.append((str(tensor.device), start, end, id(tensor), path, module, attribute))
    spans.sort(key=lambda span: span[:3])
    found = {}
    for index, (device, _, end, identity, path, module, attribute) in enumerate(spans):
        for other_device, start, _, other_identity, other_path, other, other_attribute in spans[index + 1 :]:
            if other_device != device or start >= end:
                break
            if other_identity != identity:
                if attribute == weight_name(module):
                    found[module] = f"its weight shares memory with {other_path}"
                if other_attribute == weight_name(other):
                    found[other] = f"its weight shares memory with {path}"
    return found


def _tie(sites: list[Site], names: Mapping[nn.Module, list[str]]) -> list[Site]:
    """Groups sites that use one parameter as their weight, and keeps those it also serves elsewhere."""
    owners: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in names:
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                owners[id(tensor)].append((module, attribute))
    site_of = {site.module: site for site in sites}
    tied = []
    for site in sites:
        own = weight_name(site.module)
        weight = own_parameter(site.module, own)
        users = owners[id(weight)] if weight is not None else [(site.module, own)]
        kept = site.kept
        for module, attribute in users:
            other = site_of.get(module)
            apart = other is None or other.kept is not None or type(module) is not type(site.module)
            if kept is None and (attribute != own or apart):
                path = f"{names[module][0]}.{attribute}".removeprefix(".")
                kept = f"its weight is tied to {path}, which stays as it is"
        group = min((site_of[module].group for module, _ in users if module in site_of), default=site.group)
        tied.append(replace(site, kept=kept, group=group))
    return tied
