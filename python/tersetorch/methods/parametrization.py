"""How a weight is compressed while its model still trains: one parametrization with a mask, codes and a codebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersetorch.methods import adoption, vector_codes

MAX_ENTRIES = 256
# Where torch's list for a tensor keeps the tensor's former place among the module's parameters.
PLACE = "place_among_parameters"


class BakedWeight(nn.Module):
    """A parametrization of ours: finalize puts what it computes into a plain parameter."""


class CompressedWeight(BakedWeight):
    """weight = where(mask, codebook[g, codes] or original, 0); never original * mask, which gives -0.0 and keeps NaN.

    The group g of a position, in the weight as a matrix [rows, columns], is 0, its row, or its block of columns. Until
    it is shared, original trains, and a pruned position has no gradient, unless dense_gradient lets it have dL/dweight
    as the others do. While it is shared, original is frozen and codebook trains: dL/dcodebook[g, k] is the sum of
    dL/dweight over the positions of group g with code k that mask keeps.

    Attributes:
        mask: bool, of the weight's shape; what is False is 0.
        dense_gradient: whether pruned positions of original train unseen, as prune.DynamicSurgery wants while it runs;
            no part of the state, a deep copy has it too, and a shared weight does not look at it.
        codes: uint8, of the weight's shape, or None while the weight is not shared. Where sub-vectors are shared, as
            quantize.product and .residual do: [rows, stages * segments], see methods.vector_codes.VectorCodes.
        codebook: parameter [groups, entries], entries <= 256, or None while the weight is not shared; float64 for a
            float64 weight, else float32, and of that dtype still after model.half() or .bfloat16(). Where sub-vectors
            are shared: [stages, segments or 1, width, entries].
        column_block: how many columns share a row of codebook; 0 where its only row is for the tensor, or each for one
            of the weight's rows. Part of the state where it is not 0.
        rounded: whether the weight has the values rounded to bfloat16; codebook trains as if it had its own. Part of
            the state where it is True.

    Source:
        Han et al., Deep Compression (2016), section 3 and equation 3.
    """

    mask: Tensor
    codes: Tensor | None
    codebook: nn.Parameter | None

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.dense_gradient = False
        self.surgery: int | None = None  # which prune.DynamicSurgery asked for it last
        self.column_block = 0
        self.rounded = False
        self.register_buffer("codes", None)
        self.register_parameter("codebook", None)

    def forward(self, original: Tensor) -> Tensor:
        """The weight, of original's dtype."""
        if self.dense_gradient and self.codebook is None:
            return cast(Tensor, _KeepWithDenseGradient.apply(self.mask, original))
        kept = original
        if self.codebook is not None and self.codes is not None:
            kept = self._decoded(self.codebook, original.dtype)
        return torch.where(self.mask, kept, 0)

    def _decoded(self, codebook: Tensor, dtype: torch.dtype) -> Tensor:
        """The value of each code."""
        if codebook.dim() == 4:
            assert self.codes is not None
            shape = self.mask.shape
            return vector_codes.decode(self.codes, codebook, shape[1:].numel()).view(shape).to(dtype)
        if self.rounded:
            # Finite values stay so, as where they are found; what is added is 0, and lets codebook train.
            largest = torch.finfo(torch.bfloat16).max
            nearest = codebook.detach().clamp(-largest, largest).to(torch.bfloat16).to(codebook.dtype)
            codebook = nearest + (codebook - codebook.detach())
        return codebook.flatten().index_select(0, self._places().flatten()).view(self.mask.shape).to(dtype)

    def _places(self) -> Tensor:
        """Where in the flattened codebook the value of each code stands, int32."""
        assert self.codes is not None and self.codebook is not None
        codes, (groups, entries) = self.codes.int(), self.codebook.shape
        if groups == 1:
            return codes
        if self.column_block:
            group = torch.arange(codes[0].numel(), dtype=torch.int32, device=codes.device) // self.column_block
            return codes + (group * entries).view(codes.shape[1:])
        group = torch.arange(groups, dtype=torch.int32, device=codes.device)
        return codes + (group * entries).view(-1, *[1] * (codes.dim() - 1))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Takes in a weight that is assigned: the mask stays on, and each shared value becomes its members' mean."""
        if self.codebook is not None and weight.shape == self.mask.shape:
            self.codebook.data.copy_(self.nearest_codebook(weight))
        return weight

    @torch.no_grad()
    def nearest_codebook(self, weight: Tensor) -> Tensor:
        """The codebook that brings the shared weight nearest to weight in squared error, the codes as they are."""
        assert self.codes is not None and self.codebook is not None
        if self.codebook.dim() == 4:
            dense = torch.where(self.mask, weight.detach().to(self.mask.device), 0).flatten(1)
            return vector_codes.nearest_codebooks(dense, self.codes, self.codebook)
        codes = self._places()[self.mask].long()
        values = weight.detach().to(self.mask.device)[self.mask].double()
        entries = self.codebook.numel()
        count = torch.bincount(codes, minlength=entries)
        # Measured from one member of each, so that members that agree give their value to the bit.
        first = values.new_zeros(entries).scatter_(0, codes, values)
        mean = first + torch.bincount(codes, weights=values - first[codes], minlength=entries) / count.clamp(min=1)
        found = torch.where(count > 0, mean, self.codebook.flatten().double())
        return found.view_as(self.codebook).to(self.codebook.dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.column_block:
            destination[prefix + "column_block"] = torch.tensor(self.column_block)
        if self.rounded:
            destination[prefix + "rounded"] = torch.tensor(True)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        before = self.codebook
        dtype = None if before is None else before.dtype
        values = None if before is None else before.data
        super()._apply(fn, recurse)
        if self.codebook is not None and values is not None and self.codebook.dtype != dtype:
            self.codebook.data = values.to(self.codebook.device)
            self.codebook.grad = None
        return self


class _KeepWithDenseGradient(torch.autograd.Function):
    """where(mask, original, 0), whose gradient reaches all of original: dL/doriginal = dL/dweight."""

    generate_vmap_rule = True

    @staticmethod
    def forward(mask: Tensor, original: Tensor) -> Tensor:
        return torch.where(mask, original, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is saved, so a mask may change between the passes."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


@dataclass(frozen=True)
class LiveWeight:
    """A tensor of a module that carries our parametrization.

    Attributes:
        module: the module.
        tensor: the name the tensor has there.
        held: torch's list for it: our parametrization, then those that others registered later.
    """

    module: nn.Module
    tensor: str
    held: parametrize.ParametrizationList

    @property
    def compressed(self) -> CompressedWeight:
        """Our parametrization."""
        return cast(CompressedWeight, self.held[0])

    @property
    def original(self) -> nn.Parameter:
        """The parameter that module had before, the same object."""
        return cast(nn.Parameter, self.held.original)


def live_weight(module: nn.Module, tensor: str) -> LiveWeight | None:
    """The parametrization of module's tensor when it is ours, else None."""
    held = parametrization_list(module, tensor)
    if held is None or not isinstance(held[0], CompressedWeight):
        return None
    return LiveWeight(module, tensor, held)


def live_weights(model: nn.Module) -> list[LiveWeight]:
    """Every compressed weight of model, one entry for each module that holds it, in the order they were attached."""
    return [live for module in model.modules() for live in _live_weights_of(module)]


def parametrization_list(module: nn.Module, tensor: str) -> parametrize.ParametrizationList | None:
    """What torch keeps for a parametrized tensor of module, or None for another tensor."""
    if not parametrize.is_parametrized(module, tensor):
        return None
    return cast(parametrize.ParametrizationList, cast(nn.ModuleDict, module.parametrizations)[tensor])


def parametrized_tensors(module: nn.Module) -> list[str]:
    """The names of the tensors of module that anybody has parametrized."""
    return list(cast(nn.ModuleDict, module.parametrizations)) if parametrize.is_parametrized(module) else []


def _live_weights_of(module: nn.Module) -> list[LiveWeight]:
    found = (live_weight(module, tensor) for tensor in parametrized_tensors(module))
    return [live for live in found if live is not None]


def is_live(model: nn.Module) -> bool:
    """Whether model still carries a parametrization of ours, so that finalize has something to do."""
    return any(isinstance(module, BakedWeight) for module in model.modules())


def attach(owners: Sequence[tuple[nn.Module, str]]) -> CompressedWeight:
    """The one parametrization of the weight that all owners hold, made with nothing pruned where there is none yet."""
    present = [live_weight(module, tensor) for module, tensor in owners]
    compressed = next((live.compressed for live in present if live is not None), None)
    if compressed is None:
        module, tensor = owners[0]
        compressed = CompressedWeight(torch.ones_like(getattr(module, tensor), dtype=torch.bool, requires_grad=False))
    for (module, tensor), live in zip(owners, present, strict=True):
        if live is None:
            place = list(module._parameters).index(tensor)
            own_class(module)
            original = module._parameters[tensor]
            assert original is not None
            # Through a stand-in: torch calls set_ on the tensor, which cuts off what waits for its gradient, as
            # DistributedDataParallel does.
            stand_in = torch.zeros((), dtype=original.dtype, device=original.device).expand(original.shape)
            module._parameters[tensor] = nn.Parameter(stand_in, requires_grad=False)
            parametrize.register_parametrization(module, tensor, compressed)
            held = parametrization_list(module, tensor)
            assert held is not None
            held.original = original
            setattr(held, PLACE, place)
            setattr(type(module), "_load_from_state_dict", _load_live)  # noqa: B010 (mypy takes no such assignment)
    return compressed


def share(
    owners: Sequence[tuple[nn.Module, str]],
    codes: Tensor,
    codebook: Tensor,
    column_block: int = 0,
    rounded: bool = False,
) -> None:
    """Makes the weight of owners codebook[g, codes] where its mask keeps it; the codebook trains where the weight did.

    Optimizers that hold the weight take in the codebook, see tersetorch.methods.adoption.
    """
    attach(owners)
    live = live_weight(*owners[0])
    assert live is not None
    _share(live, codes, codebook, column_block, rounded)


def detach(live: LiveWeight) -> None:
    """Takes our parametrization off; the original, as it is, becomes the module's tensor or the input of what is left.

    Several weights of a module come off in the opposite of the order they were attached in, so that each returns to
    its place among the parameters, which optimizers count by.
    """
    module, tensor, held = live.module, live.tensor, live.held
    own_class(module)
    if len(held) > 1:
        del held[0]
        return
    parametrize.remove_parametrizations(module, tensor, leave_parametrized=False)
    move_parameter(module, tensor, getattr(held, PLACE))


@torch.no_grad()
def bake(model: nn.Module) -> None:
    """Puts what our other parametrizations compute in evaluation into plain parameters."""
    for module in list(model.modules()):
        for tensor in reversed(parametrized_tensors(module)):
            held = parametrization_list(module, tensor)
            if held is None or not isinstance(held[0], BakedWeight) or isinstance(held[0], CompressedWeight):
                continue
            own_class(module)
            held[0].eval()
            original = held.original
            parametrize.remove_parametrizations(module, tensor, leave_parametrized=True)
            assert module._parameters[tensor] is original
            move_parameter(module, tensor, getattr(held, PLACE))


def move_parameter(module: nn.Module, tensor: str, place: int) -> None:
    """Gives a parameter that place among the module's parameters, by which optimizers and state dicts count."""
    order = [name for name in module._parameters if name != tensor]
    order.insert(place, tensor)
    for name in order:
        module._parameters[name] = module._parameters.pop(name)


@torch.no_grad()
def release_graphs(model: nn.Module) -> None:
    """Makes a live model copyable after a forward pass: recurrent modules keep the weights that it computed."""
    for module in model.modules():
        if isinstance(module, nn.RNNBase) and parametrize.is_parametrized(module):
            module._init_flat_weights()


def own_class(module: nn.Module) -> None:
    """Gives a parametrized module a class that no deep copy of it shares.

    torch keeps a parametrized tensor as a property of a class made for the module; copy.deepcopy hands the same class
    to the copy, so that adding or removing a property there would reach the other model.
    """
    if parametrize.is_parametrized(module):
        shared = type(module)
        members = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
        module.__class__ = type(shared.__name__, shared.__bases__, members)


def unshare(live: LiveWeight) -> None:
    """Lets the original train again where the codebook did; the codes and the codebook go."""
    compressed = live.compressed
    if compressed.codebook is not None:
        live.original.requires_grad_(compressed.codebook.requires_grad)
        adoption.replace(compressed.codebook, None)
        compressed.codes = None
        compressed.codebook = None
        compressed.column_block, compressed.rounded = 0, False


def _share(live: LiveWeight, codes: Tensor, codebook: Tensor, column_block: int, rounded: bool) -> None:
    compressed = live.compressed
    compressed.column_block, compressed.rounded = column_block, rounded
    former = compressed.codebook
    trains = live.original.requires_grad if former is None else former.requires_grad
    compressed.codes = codes
    compressed.codebook = nn.Parameter(codebook, requires_grad=trains)
    live.original.requires_grad_(False)
    live.original.grad = None
    if former is not None:
        adoption.replace(former, compressed.codebook)
    adoption.announce(live.held)


def _load_live(self: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """_load_from_state_dict of a module with compressed weights: reads dense checkpoints, and shared ones or not.

    A checkpoint with the plain weight is read under the mask; a shared weight is clustered anew, to as many values,
    unless it has just the values that its codes say, as a finalized copy of the same model has.
    """
    errors: list[str] = args[-1]
    for live in _live_weights_of(self):
        compressed = live.compressed
        plain = prefix + live.tensor
        inside = f"{prefix}parametrizations.{live.tensor}"
        mask, codes, codebook = (f"{inside}.0.{name}" for name in ("mask", "codes", "codebook"))
        if f"{inside}.original" in state_dict:
            # No buffers, so that torch would not expect them.
            options = [state_dict.pop(f"{inside}.0.{name}", None) for name in ("column_block", "rounded")]
            problem = _prepare(live, state_dict.get(codes), state_dict.get(codebook), *options)
            if problem is not None:
                errors.append(f"{inside}.0: {problem}")
                state_dict.pop(codes, None)
                state_dict.pop(codebook, None)
        elif plain in state_dict:
            weight = state_dict.pop(plain)
            state_dict[f"{inside}.original"] = weight
            state_dict[mask] = compressed.mask
            if compressed.codebook is not None:
                fits = isinstance(weight, Tensor) and weight.shape == compressed.mask.shape
                if fits and bool(weight[compressed.mask.to(weight.device)].isfinite().all()):
                    _share_anew(live, weight)
                elif fits:
                    errors.append(f"{plain} must be finite to be shared, got NaN or infinity; load it before sharing")
                    del state_dict[f"{inside}.original"], state_dict[mask]
                    continue
                state_dict[codes] = compressed.codes
                state_dict[codebook] = compressed.codebook.detach()
    before: Any = parametrize.type_before_parametrizations(self)
    before._load_from_state_dict(self, state_dict, prefix, *args)


def _prepare(live: LiveWeight, codes: Any, codebook: Any, column_block: Any, rounded: Any) -> str | None:
    """Makes room for the codes and the codebook that are about to be loaded, or for none; or says what is wrong."""
    if codes is None and codebook is None:
        unshare(live)
        return None
    for name, value in (("column_block", column_block), ("rounded", rounded)):
        if value is not None and (not isinstance(value, Tensor) or value.numel() != 1 or value.is_floating_point()):
            return f"{name} must be one whole number, got {value!r}"
    block = 0 if column_block is None else int(column_block)
    problem = _codes_problem(codes, codebook, block, live.compressed.mask)
    if problem is not None:
        return problem
    compressed = live.compressed
    present = compressed.codebook
    if present is None or present.shape != codebook.shape:
        blank = torch.zeros(codes.shape, dtype=torch.uint8, device=compressed.mask.device)
        wide = torch.float64 if live.original.dtype == torch.float64 else torch.float32
        _share(live, blank, torch.zeros(codebook.shape, dtype=wide, device=blank.device), 0, False)
    compressed.column_block, compressed.rounded = block, rounded is not None and bool(rounded)
    return None


@torch.no_grad()
def _share_anew(live: LiveWeight, dense: Tensor) -> None:
    """Shares a dense checkpoint's weight: by the codes there are where its values agree with them, else clustered."""
    compressed = live.compressed
    assert compressed.codebook is not None and compressed.codes is not None
    dense = dense.to(compressed.mask.device)
    codebook = compressed.nearest_codebook(dense)
    decoded = compressed._decoded(codebook, dense.dtype)[compressed.mask]
    # Sums of several entries agree but for rounding.
    agrees = torch.allclose if codebook.dim() == 4 else torch.equal
    if agrees(decoded, dense[compressed.mask]):
        compressed.codebook.copy_(codebook)
        return
    if codebook.dim() == 4:
        _share_vectors_anew(live, torch.where(compressed.mask, dense, 0))
        return
    from tersetorch.methods.quantize.sharing import Per, share_values  # its package imports this module

    groups, entries = codebook.shape
    kept = compressed.mask & (dense != 0)  # zeros stay zero, as they do when kmeans is called
    per: Per = compressed.column_block or ("tensor" if groups == 1 else "row")
    codes, codebook = share_values(dense, kept, entries, per, bfloat16=compressed.rounded)
    _share(live, codes, codebook.to(compressed.codebook.dtype), compressed.column_block, compressed.rounded)


def _share_vectors_anew(live: LiveWeight, dense: Tensor) -> None:
    """Quantises a weight anew, to sub-vectors as many and as wide as it has."""
    from tersetorch.methods.quantize.product import product_quantize  # its package imports this module
    from tersetorch.methods.quantize.residual import residual_quantize

    present = live.compressed.codebook
    assert present is not None
    stages, books, width, entries = present.shape
    matrix = dense.flatten(1)
    if stages > 1:
        found = residual_quantize(matrix, stages, entries)
    else:
        found = product_quantize(matrix, entries, sub_vector=width, shared=books == 1 and width < matrix.shape[1])
    _share(live, found.codes, found.codebooks.to(present.dtype), 0, False)


def _codes_problem(codes: Any, codebook: Any, column_block: int, mask: Tensor) -> str | None:
    if not isinstance(codes, Tensor) or not isinstance(codebook, Tensor):
        return "codes and codebook must come together, got only one of them"
    rows, columns = mask.shape[0], mask.shape[1:].numel()
    if codebook.dim() == 4:
        return vector_codes.codes_problem(codes, codebook, rows, columns)
    if column_block < 0:
        return f"column_block must be at least 1, got {column_block}"
    groups = [-(-columns // column_block)] if column_block else list(dict.fromkeys((1, rows)))
    if codebook.dim() != 2 or codebook.shape[0] not in groups or not 1 <= codebook.shape[1] <= MAX_ENTRIES:
        shapes = " or ".join(f"[{count}, entries]" for count in groups)
        return f"codebook must be {shapes} with 1 <= entries <= {MAX_ENTRIES}, got {tuple(codebook.shape)}"
    if codes.dtype != torch.uint8 or codes.shape != mask.shape:
        return f"codes must be uint8 {tuple(mask.shape)}, got {codes.dtype} {tuple(codes.shape)}"
    if codes.numel() and int(codes.max()) >= codebook.shape[1]:
        return f"codes must lie in [0, {codebook.shape[1]}), got {int(codes.max())}"
    return None
