"""What layers of shared sub-vectors have in common: their tensors, and where those of a dense layer come from."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from tersetorch import ops
from tersetorch.formats import ProductWeight
from tersetorch.formats.vector_codes import noted_codes
from tersetorch.nn.dense_form import bias_of
from tersetorch.nn.shared_module import SharedProduct


class ProductModule(SharedProduct):
    """A layer with a buffer codes, packed, and parameters codebooks [stages, segments or 1, width, entries], bias."""

    format = ProductWeight
    parameter_field = "codebooks"
    mode = "exact"

    codebooks: nn.Parameter

    @property
    def layout(self) -> str:
        """How it computes, under the name that other layers have for that: "product" or "product_int8"."""
        return "product" if self.mode == "exact" else f"product_{self.mode}"

    @property
    def plain_layout(self) -> str:
        """The same: it is decided where the layer is made."""
        return self.layout

    @property
    def product_weight(self) -> ProductWeight:
        """The weight in its format; it shares memory with the layer."""
        weight: ProductWeight = self.shared_weight
        return weight

    def _weight_of(self, codes: Tensor, values: Tensor) -> ProductWeight:
        return ProductWeight(codes, values, *self._matrix_shape)

    @classmethod
    def from_dense(cls, module: Any, sub_vector: int | None = None, **options: Any) -> Self:
        """The layer that computes what module computes.

        A module that quantize.product or quantize.residual has made share keeps its codes and codebooks; of sums they
        are still known after finalize, until the weight is changed. Any other weight is searched for the parts that
        its rows share.

        Args:
            module: nn.Linear or nn.Conv2d, as the layer is.
            sub_vector: columns of a segment, where they have to be searched for; None for those that take the fewest
                bytes, see ProductWeight.find.
            options: of a linear layer its mode.

        Raises:
            TypeError: module is no such layer, or its weight is neither float32 nor bfloat16.
            ValueError: the weight has more distinct parts than codes can name, or is not what its codes say, since it
                was pruned after, or rounded where rows are sums; or there is no such mode.
        """
        cls._check_source(module)
        weight = known_weight(cls.__name__, module)
        if weight is None:
            weight = cls._from_weight(module.weight.detach().flatten(1), sub_vector)
        return cls(weight, bias_of(module), **cls._sizes_of(module), **options).train(module.training)

    @classmethod
    def of_sizes(
        cls,
        *,
        stages: int,
        segments: int,
        width: int,
        entries: int,
        bias: bool = True,
        relu: bool = False,
        **sizes: Any,
    ) -> Self:
        """A layer of zeros, on any device, for tensors that come from elsewhere; sizes are the plain layer's."""
        layer = cls._sized(**sizes)
        weight = zero_weight(*layer._matrix_shape, (stages, segments, width, entries))
        layer._hold(weight, weight.codebooks.new_zeros(weight.shape[0]) if bias else None, relu)
        return layer

    def _config(self) -> dict[str, Any]:
        names = ("stages", "segments", "width", "entries")
        return {
            **dict(zip(names, self.codebooks.shape, strict=True)),
            **({} if self.bias is not None else {"bias": False}),
            **({"mode": self.mode} if self.mode != "exact" else {}),
            **({"relu": True} if self.relu else {}),
        }

    def _shown(self) -> list[str]:
        stages, _, width, entries = self.codebooks.shape
        shown = [f"bias={self.bias is not None}", f"stages={stages}", f"sub_vector={width}", f"entries={entries}"]
        return [*shown, *[f"mode={self.mode}"] * (self.mode != "exact"), *["relu=True"] * self.relu]

    @classmethod
    def _from_weight(cls, weight: Tensor, sub_vector: int | None) -> ProductWeight:
        return ProductWeight.from_dense(weight, sub_vector)


class ResidualForm:
    """The form that residual quantisation gives a weight, as a layer that computes with it checks it."""

    def _check_form(self, weight: ProductWeight) -> None:
        if weight.segments > 1:
            name = type(self).__name__
            raise ValueError(
                f"{name}: weight must have one segment as wide as its {weight.columns} columns, got "
                f"{weight.segments} segments; use {name.replace('Residual', 'Product')}"
            )

    @classmethod
    def _from_weight(cls, weight: Tensor, sub_vector: int | None) -> ProductWeight:
        raise ValueError(
            f"{cls.__name__}: module must have a weight that quantize.residual made and nobody changed since, got "
            "another one, whose sums nobody can take apart; quantise it, and build the layer before you change it"
        )


def known_weight(owner: str, module: nn.Linear | nn.Conv2d) -> ProductWeight | None:
    """The codes and codebooks of a live weight of shared sub-vectors, or of a finalized one of sums; None for others.

    Raises:
        ValueError: they do not say all of the weight: a mask hides some, or its dtype rounds sums of them.
    """
    lists: Any = getattr(module, "parametrizations", None)
    if lists is not None and "weight" in lists:
        held: Any = lists["weight"][0]
        codes, codebook = getattr(held, "codes", None), getattr(held, "codebook", None)
    else:
        codes, codebook = noted_codes(module, "weight") or (None, None)
    if not (isinstance(codes, Tensor) and isinstance(codebook, Tensor) and codebook.dim() == 4):
        return None
    dense, stages = module.weight.detach().flatten(1), codebook.shape[0]
    # A weight of one stage is its entries, which the dtype rounds alike; sums are rounded after they are made.
    values = (codebook.detach().to(dense.dtype) if stages == 1 else codebook.detach()).float().clone()
    weight = ProductWeight.from_codes(codes.flatten(1), values, dense.shape[1])
    found, dense = weight.to_dense(), dense.float()
    # The order of a sum's terms may move its last bits.
    slack = 1e-6 * stages * float(dense.abs().max()) if stages > 1 and dense.numel() else 0.0
    if not torch.allclose(found, dense, rtol=0, atol=slack, equal_nan=True):
        raise ValueError(
            f"{owner}: module's weight must be what its codes and codebooks say, got one that a mask or its dtype, "
            f"{module.weight.dtype}, makes another; prune and convert to that dtype first, then quantise"
        )
    return weight


def zero_weight(rows: int, columns: int, shape: tuple[int, int, int, int]) -> ProductWeight:
    """A weight of zeros with codebooks of this shape, for tensors that come from elsewhere."""
    codes = torch.zeros(rows, shape[0] * ops.product_segments(columns, shape[2]), dtype=torch.uint8)
    return ProductWeight(ops.product_pack(codes, shape[3]), torch.zeros(shape), rows, columns)
