"""The table of layers that may stand in for a dense one: a new format that computes is one more row."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tersetorch.formats import CodebookWeight, ProductWeight, SignWeight
from tersetorch.formats.vector_codes import noted_codes
from tersetorch.nn import (
    BinaryConv2d,
    BinaryLinear,
    ClusteredConv2d,
    CodebookConv2d,
    CodebookEmbedding,
    CodebookLinear,
    FixedPointConv2d,
    FixedPointLinear,
    FlattenedConv2d,
    LowRankConv2d,
    LowRankLinear,
    ProductConv2d,
    ProductLinear,
    ResidualConv2d,
    ResidualLinear,
    SparseCodebookConv1d,
    SparseCodebookConv2d,
    SparseCodebookLinear,
    SparseConv1d,
    SparseConv2d,
    SparseLinear,
)
from tersetorch.nn.codebook_embedding import why_not
from tersetorch.ops import FLAT_MAX_KERNEL

MAX_DISTINCT = 255
MAX_NARROW = 2**16
MAX_INT8_WEIGHTS = 128 * 1024
MIN_CODED = 16
# Weights looked at at once: one that nobody shared is recognised by the first of them.
SAMPLE = 65536


@dataclass(frozen=True)
class Candidate:
    """One way to run a layer.

    Attributes:
        name: the format's name in plans and reports.
        alias: what plan= calls it for a whole model. Several may have the same: the smallest that can hold a layer's
            weight is taken. "" where only a layer's name can ask for it.
        source: the layer it replaces; exactly this class, since a subclass may compute something else.
        layer: the class it builds.
        max_density: above this share of non-zeros the format is larger than the dense weight, and is not measured.
        applies: why the format cannot hold a layer's weight, or None when it can.
        build: the new layer, computing what the given one computes.
        layout: what the new layer computes from, as its pack() takes it.
        options: of pack(), for a number of samples multiplied at once, or for None, a number nobody told.
        exact: whether only the order of sums differs from the dense layer's; the others are measured only where the
            caller allows an error, or told by plan.
        nbytes: of the new layer's weight; told only where another candidate for the same layer has the same alias.
        signs: whether it multiplies signs only, so that a layer's input must be known to be that.
        pays: why it is not worth measuring, since another candidate is smaller, or None.
        min_samples, max_samples: with fewer or more at once another candidate is always faster, and this one is not
            measured.
    """

    name: str
    alias: str
    source: type[nn.Module]
    layer: type[nn.Module]
    max_density: float
    applies: Callable[[nn.Module], str | None]
    build: Callable[[Any], nn.Module]
    layout: str = "csr"
    options: Callable[[int | None], dict[str, Any]] = lambda samples: {}
    exact: bool = True
    nbytes: Callable[[nn.Module], int] = lambda module: 0
    signs: bool = False
    pays: Callable[[nn.Module], str | None] = lambda module: None
    min_samples: int = 0
    max_samples: int | None = None

    def fits(self, samples: int, max_error: float | None) -> str | None:
        """Why it is not measured with so many samples and this error allowed, or None when it is."""
        if not self.exact and max_error is None:
            return "it rounds, and max_error= allows no error"
        if samples < self.min_samples:
            return f"made for {self.min_samples} samples or more, and there are {samples}"
        if self.max_samples is not None and samples > self.max_samples:
            return f"made for {self.max_samples} samples or fewer, and there are {samples}"
        return None


def weight_of(module: nn.Module) -> Tensor:
    """The dense weight of a layer."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def density(weight: Tensor) -> float:
    """Share of non-zeros in weight, in [0, 1]; 0 for an empty one."""
    return int(torch.count_nonzero(weight)) / max(1, weight.numel())


def distinct_values(weight: Tensor) -> int | None:
    """Number of distinct non-zero values of weight where it is at most 255, otherwise None."""
    values = weight.flatten()
    found = values[:0]
    # Looking a value up among few is faster than sorting all of them.
    for part in values.split(SAMPLE):
        at = torch.searchsorted(found, part).clamp_(max=max(0, found.numel() - 1))
        new = part[found[at] != part] if found.numel() else part
        if new.numel():
            found = torch.unique(torch.cat([found, new]))
            if found.numel() > MAX_DISTINCT + 1:
                break
    count = int(torch.count_nonzero(found))
    return count if count <= MAX_DISTINCT else None


def _always(module: nn.Module) -> str | None:
    return None


def _has_few_values(module: nn.Module) -> str | None:
    if distinct_values(weight_of(module)) is None:
        return f"more than {MAX_DISTINCT} distinct non-zero values"
    return None


def _is_shared(module: nn.Module) -> str | None:
    weight = weight_of(module)
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"weights of {weight.dtype}"
    return "more than 256 distinct values" if CodebookWeight.find(weight.flatten(1)) is None else None


def _is_shared_embedding(module: nn.Module) -> str | None:
    assert isinstance(module, nn.Embedding)
    return why_not(module) or _is_shared(module)


def _is_of_parts(module: nn.Module) -> str | None:
    weight = weight_of(module)
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"weights of {weight.dtype}"
    if noted_codes(module, "weight") is not None:
        return "its rows are sums of shared rows, which quantize.residual made"
    found = ProductWeight.find(weight.flatten(1))
    return "its rows share no sub-vectors, at most 256 in each segment of columns" if found is None else None


def _pays_in_parts(module: nn.Module) -> str | None:
    weight = weight_of(module)
    others = min(size for size in (_bytes_of_nonzeros(module), _bytes_of_codes(module), weight.numel() * 4) if size)
    if SignWeight.why_not(weight) is None or ProductWeight.find(weight.flatten(1), others) is None:
        return "no shared sub-vectors take fewer bytes than its signs, its non-zeros or codes of its values"
    return None


def _is_of_sums(module: nn.Module) -> str | None:
    weight = weight_of(module)
    if weight.dtype != torch.float32:
        return f"weights of {weight.dtype}, which rounds sums of shared rows"
    if noted_codes(module, "weight") is None:
        return "its rows are no sums that quantize.residual made and nobody changed since"
    return None


def _bytes_of_nonzeros(module: nn.Module) -> int:
    weight = weight_of(module)
    return 5 * int(torch.count_nonzero(weight)) + 4 * weight.shape[0]


def _bytes_of_codes(module: nn.Module) -> int:
    weight = CodebookWeight.find(weight_of(module).flatten(1))
    return 0 if weight is None else weight.nbytes


def _is_shared_in_filters(module: nn.Module) -> str | None:
    # A filter's codes take whole chunks: of one with few weights they are more bytes than it is.
    weights = weight_of(module)[:1].numel()
    return f"fewer than {MIN_CODED} weights in a filter" if weights < MIN_CODED else _is_shared(module)


def _is_of_signs(module: nn.Module, inputs: str = "signs") -> str | None:
    weight = weight_of(module)
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"weights of {weight.dtype}"
    sizes = BinaryConv2d.why_not(module, inputs) if isinstance(module, nn.Conv2d) else None
    why_not = SignWeight.why_not(weight)
    return sizes or (None if why_not is None else f"a row must hold +a and -a only, and there is {why_not}")


def _rank(weight: Tensor) -> int:
    """How many singular values of a weight, as a matrix, are more than what rounding leaves of zeros; at least 1."""
    matrix = weight.flatten(1)
    values = torch.linalg.svdvals(matrix.double())
    rounding = max(matrix.shape) * torch.finfo(weight.dtype).eps * values.max()
    return max(1, int((values > rounding).sum()))


def _is_of_low_rank(module: nn.Module) -> str | None:
    weight = weight_of(module)
    if getattr(module, "groups", 1) != 1:
        return f"of {module.groups} groups"
    (rows, columns), rank = weight.flatten(1).shape, _rank(weight)
    return f"its rank is {rank}, and factors would be larger" if rank * (rows + columns) >= rows * columns else None


def _by_name(module: nn.Module) -> str | None:
    return "by name only"


def _both(*checks: Callable[[nn.Module], str | None]) -> Callable[[nn.Module], str | None]:
    return lambda module: next((why for why in (check(module) for check in checks) if why), None)


def _is_narrow(module: nn.Module) -> str | None:
    columns = weight_of(module)[:1].numel()
    return f"more than {MAX_NARROW} columns" if columns > MAX_NARROW else None


def _is_narrow_with_few_values(module: nn.Module) -> str | None:
    return _is_narrow(module) or _has_few_values(module)


def _has_small_filters(module: nn.Module) -> str | None:
    weights = weight_of(module)[:1].numel()
    return f"more than {MAX_INT8_WEIGHTS} weights in a filter" if weights > MAX_INT8_WEIGHTS else None


def _has_short_filters(module: nn.Module) -> str | None:
    assert isinstance(module, FlattenedConv2d)
    if max(module.kernel_size) > FLAT_MAX_KERNEL:
        return f"filters of more than {FLAT_MAX_KERNEL} taps"
    # What a conversion makes a layer compute is its to take back.
    return "a ReLU of its own; pack('fused') lays it out" if module.relu else None


def _for_samples(samples: int | None) -> dict[str, Any]:
    return {} if samples is None else {"samples": max(1, samples)}


def _row(
    name: str,
    layer: type[Any],
    max_density: float,
    applies: Callable[[nn.Module], str | None],
    *,
    alias: str | None = None,
    source: type[nn.Module] = nn.Linear,
    **more: Any,
) -> Candidate:
    return Candidate(name, alias or name, source, layer, max_density, applies, layer.from_dense, **more)


def _convolutions(
    dims: str, source: type[nn.Module], layer: type[Any], codebook_layer: type[Any]
) -> tuple[Candidate, ...]:
    return (
        _row(f"sparse_conv{dims}", layer, 0.5, _always, alias="sparse", source=source, layout="direct"),
        _row(
            f"sparse_codebook_conv{dims}",
            codebook_layer,
            0.8,
            _has_few_values,
            alias="codebook",
            source=source,
            layout="direct",
            nbytes=_bytes_of_nonzeros,
        ),
        *(
            _row(
                f"sparse_conv{dims}_{mode}",
                layer,
                1.0,
                applies,
                alias=f"sparse_{mode}",
                source=source,
                layout=f"direct_{mode}",
                exact=False,
            )
            for mode, applies in (("int8", _has_small_filters), ("bfloat16", _always))
        ),
    )


def _coded(
    name: str, layer: type[Any], applies: Callable[[nn.Module], str | None], **more: Any
) -> tuple[Candidate, ...]:
    in_int8 = _both(applies, _has_small_filters)
    return (
        _row(name, layer, 1.0, applies, alias="codebook", layout="codebook", nbytes=_bytes_of_codes, **more),
        _row(f"{name}_bfloat16", layer, 1.0, applies, layout="codebook_bfloat16", exact=False, **more),
        _row(f"{name}_int8", layer, 1.0, in_int8, layout="codebook_int8", exact=False, **more),
    )


# Layers of several factors, and what they become when these are multiplied out: a name and a plain layer.
FACTORED: dict[type[Any], tuple[str, type[nn.Module]]] = {
    LowRankLinear: ("linear", nn.Linear),
    LowRankConv2d: ("conv2d", nn.Conv2d),
    ClusteredConv2d: ("clusters", nn.Conv2d),
}


def _multiplied_out(source: type[Any], name: str, plain: type[nn.Module]) -> Candidate:
    alias = "multiplied_out"
    return Candidate(f"{alias}_{name}", alias, source, plain, 1.0, _always, source.to_dense, layout=alias)


def _low_rank(name: str, source: type[nn.Module], layer: type[Any]) -> Candidate:
    def build(module: Any) -> nn.Module:
        made: nn.Module = layer.from_dense(module, _rank(weight_of(module)))
        return made

    return Candidate(name, "low_rank", source, layer, 1.0, _is_of_low_rank, build, layout="factors", pays=_by_name)


def _vectors(
    name: str, source: type[nn.Module], layer: type[Any], residual: type[Any], modes: tuple[str, ...]
) -> tuple[Candidate, ...]:
    """Products of shared sub-vectors, and sums of them, exact and in other modes."""
    return tuple(
        Candidate(
            f"{kind}_{name}{suffix}",
            "" if suffix else kind,
            source,
            cls,
            1.0,
            applies,
            partial(cls.from_dense, mode=suffix[1:]) if suffix else cls.from_dense,
            layout=f"product{suffix}",
            exact=not suffix,
            pays=pays,
        )
        for kind, cls, applies, pays in (
            ("product", layer, _is_of_parts, _pays_in_parts),
            ("residual", residual, _is_of_sums, _always),
        )
        for suffix in ("", *(f"_{mode}" for mode in modes))
    )


def _of_other_inputs(name: str, source: type[nn.Module], layer: type[Any]) -> tuple[Candidate, ...]:
    return tuple(
        Candidate(
            f"{name}_{inputs}",
            "binary" if inputs == "real" else "",
            source,
            layer,
            1.0,
            partial(_is_of_signs, inputs=inputs),
            partial(layer.from_dense, inputs=inputs),
            layout=inputs,
            # Pixels are the nearest of 256.
            exact=inputs == "real",
        )
        for inputs in ("real", "pixels", "signed_pixels")
    )


# Below max_density a format is smaller than the dense weight, 32 bits each: with b bits a value, csr takes 32 + b of
# them a non-zero, csr16 and blocked 16 + b, a bitmap b and 1 for each weight. Bounds on samples are measured.
CANDIDATES: dict[str, Candidate] = {
    row.name: row
    for row in (
        _row("csr", SparseLinear, 0.5, _always, alias="sparse"),
        _row(
            "sparse_codebook",
            SparseCodebookLinear,
            0.8,
            _has_few_values,
            alias="codebook",
            nbytes=_bytes_of_nonzeros,
        ),
        _row("csr16", SparseLinear, 0.66, _is_narrow, layout="csr16", max_samples=16),
        _row(
            "csr16_codebook",
            SparseCodebookLinear,
            1.0,
            _is_narrow_with_few_values,
            layout="csr16",
            max_samples=16,
        ),
        _row("bitmap", SparseLinear, 0.96, _always, layout="bitmap", max_samples=8),
        _row("bitmap_codebook", SparseCodebookLinear, 1.0, _has_few_values, layout="bitmap", max_samples=8),
        _row("bitmap_int8", SparseLinear, 1.0, _always, layout="bitmap_int8", exact=False, max_samples=8),
        _row("bitmap_columns", SparseLinear, 0.96, _always, layout="bitmap_columns", max_samples=2),
        _row(
            "bitmap_columns_codebook",
            SparseCodebookLinear,
            1.0,
            _has_few_values,
            layout="bitmap_columns",
            max_samples=2,
        ),
        _row("blocked", SparseLinear, 0.66, _always, layout="blocked", options=_for_samples, min_samples=4),
        _row(
            "blocked_codebook",
            SparseCodebookLinear,
            1.0,
            _has_few_values,
            layout="blocked",
            options=_for_samples,
            min_samples=4,
        ),
        _row(
            "blocked_int8",
            SparseLinear,
            1.0,
            _always,
            layout="blocked_int8",
            options=_for_samples,
            exact=False,
            min_samples=4,
        ),
        _row(
            "blocked_bfloat16",
            SparseLinear,
            1.0,
            _always,
            layout="blocked_bfloat16",
            options=_for_samples,
            exact=False,
            min_samples=4,
        ),
        *_coded("codebook_linear", CodebookLinear, _is_shared),
        _row(
            "codebook_embedding",
            CodebookEmbedding,
            1.0,
            _is_shared_embedding,
            alias="codebook",
            source=nn.Embedding,
            layout="codebook",
        ),
        *_convolutions("2d", nn.Conv2d, SparseConv2d, SparseCodebookConv2d),
        *_coded("codebook_conv2d", CodebookConv2d, _is_shared_in_filters, source=nn.Conv2d),
        *_vectors("linear", nn.Linear, ProductLinear, ResidualLinear, ("int8",)),
        *_vectors("conv2d", nn.Conv2d, ProductConv2d, ResidualConv2d, ()),
        _row("binary_linear", BinaryLinear, 1.0, _is_of_signs, alias="binary", layout="signs", signs=True),
        *_of_other_inputs("binary_linear", nn.Linear, BinaryLinear),
        _row(
            "binary_conv2d",
            BinaryConv2d,
            1.0,
            _is_of_signs,
            alias="binary",
            source=nn.Conv2d,
            layout="signs",
            signs=True,
        ),
        *(
            _row(name, layer, 1.0, layer.why_not, alias="fixed", source=source, layout="fixed", exact=False)
            for name, layer, source in (
                ("fixed_linear", FixedPointLinear, nn.Linear),
                ("fixed_conv2d", FixedPointConv2d, nn.Conv2d),
            )
        ),
        *_of_other_inputs("binary_conv2d", nn.Conv2d, BinaryConv2d),
        Candidate(
            "flattened_conv2d",
            "",
            FlattenedConv2d,
            FlattenedConv2d,
            1.0,
            _has_short_filters,
            copy.deepcopy,
            layout="fused",
        ),
        *_convolutions("1d", nn.Conv1d, SparseConv1d, SparseCodebookConv1d),
        _low_rank("low_rank_linear", nn.Linear, LowRankLinear),
        _low_rank("low_rank_conv2d", nn.Conv2d, LowRankConv2d),
        *(_multiplied_out(source, *made) for source, made in FACTORED.items()),
    )
}
