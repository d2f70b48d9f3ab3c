"""A weight in the codes of another library."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NoReturn

import torch
from torch import Tensor
from torch.nn import functional

from tersetorch.formats import CodebookWeight

MAX_ENTRIES = 256
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class QuantizedWeight:
    """weight.flatten()[i] = codebook[i // run % groups, codes.flatten()[i]].

    So run = weight.numel() with one group is one table for the tensor, run = weight[0].numel() one for each row, and a
    shorter run one for each of the stretches of consecutive weights that have a scale of their own.

    Attributes:
        codes: uint8, of the weight's shape.
        codebook: float32 [groups, entries], 1 <= entries <= 256, finite: the numbers that the library computes with, to
            the bit.
        run: consecutive weights, in C order, that share a table.
        dtype: what the library computes in: float32, bfloat16 or float16; every entry in use is one of its numbers.
    """

    codes: Tensor
    codebook: Tensor
    run: int
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> torch.Size:
        """The weight's shape."""
        return self.codes.shape

    @property
    def groups(self) -> int:
        """Number of tables."""
        return self.codebook.shape[0]

    def to_dense(self) -> Tensor:
        """The weight, in dtype."""
        flat = self.codes.flatten()
        padded = functional.pad(flat, (0, -flat.numel() % (self.groups * self.run)))
        entries = self.codebook.shape[1]
        table = torch.arange(self.groups, dtype=torch.int32, device=flat.device)[:, None] * entries
        places = padded.view(-1, self.groups, self.run).int() + table
        dense = self.codebook.flatten().index_select(0, places.flatten())
        return dense[: flat.numel()].reshape(self.shape).to(self.dtype)

    def to_codebook_weight(self) -> CodebookWeight:
        """The weight as [out, everything else], with the same codes and tables.

        Raises:
            ValueError: tables belong to parts of single rows, as those of NF4 do; to_dense gives such a weight.
        """
        rows, columns = self.shape[0], prod(self.shape[1:])
        codes = self.codes.reshape(rows, columns)
        if self.groups == 1:
            return CodebookWeight.from_codes(codes, self.codebook)
        if self.run * self.groups == columns:
            return CodebookWeight.from_codes(codes, self.codebook, column_block=self.run)
        if self.run % columns:
            _refuse(f"run must be whole rows of {columns} weights, or tables those of blocks of columns", self.run)
        of_rows = self.codebook.repeat_interleave(self.run // columns, 0)[:rows]
        return CodebookWeight.from_codes(codes, of_rows)

    def validate(self) -> None:
        """Checks what to_dense relies on.

        Raises:
            TypeError: a tensor has another dtype than the class names.
            ValueError: shapes, run, codes or codebook do not fit each other.
        """
        for name, dtype in (("codes", torch.uint8), ("codebook", torch.float32)):
            tensor = getattr(self, name)
            if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"QuantizedWeight: {name} must be {dtype}, got {got}; convert it")
        if self.dtype not in FLOATS:
            raise TypeError(f"QuantizedWeight: dtype must be float32, bfloat16 or float16, got {self.dtype}; name one")
        if self.codebook.dim() != 2 or not 1 <= self.codebook.shape[1] <= MAX_ENTRIES or not self.groups:
            _refuse(f"codebook must be [groups, entries] with 1 to {MAX_ENTRIES} entries", list(self.codebook.shape))
        if self.codebook.numel() > 2**31 - 1:
            _refuse("codebook must hold fewer than 2**31 numbers", self.codebook.numel())
        weights, period = self.codes.numel(), self.run * self.groups
        if self.run < 1 or (weights % period and -(-weights // self.run) != self.groups):
            _refuse(f"run must give each of {self.groups} tables as many of {weights} weights", self.run)
        if not bool(self.codebook.isfinite().all()):
            _refuse("codebook must hold finite numbers", "NaN or infinity")
        if weights and int(self.codes.max()) >= self.codebook.shape[1]:
            _refuse(f"codes must lie below {self.codebook.shape[1]}", int(self.codes.max()))


def _refuse(rule: str, came: object) -> NoReturn:
    raise ValueError(f"QuantizedWeight: {rule}, got {came}; read the model again")
