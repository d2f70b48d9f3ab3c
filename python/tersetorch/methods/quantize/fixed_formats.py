"""Formats for a float model, layer by layer, from its weights and from what flows through it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tersetorch.formats import FixedFormat
from tersetorch.formats.fixed_format import FixedFormats, note_formats
from tersetorch.methods.arguments import check_choice, check_int
from tersetorch.methods.prune.calibration import call, check_data, evaluating
from tersetorch.methods.selection import Patterns, select

# Values of a tensor that an error is measured on, at most about.
SAMPLE = 1 << 16


class Spread:
    """What rounding to each <IL, bits - IL> does to values that are seen bit by bit.

    Attributes:
        errors: sum of squared errors for IL of 1, 2, ..., bits.
        low, high: the least and the largest value, and 0.
        count: how many values there were.
    """

    def __init__(self, bits: int) -> None:
        self.formats = [FixedFormat(integer_bits, bits - integer_bits) for integer_bits in range(1, bits + 1)]
        self.errors = [0.0] * bits
        self.low = self.high = 0.0
        self.count = 0

    def add(self, values: Tensor) -> None:
        """Looks at values, float32 or another floating-point dtype; of large tensors it draws those for the errors."""
        flat = values.detach().flatten().float()
        if not flat.numel():
            return
        low, high = (float(end) for end in flat.aminmax())
        if not (abs(low) < torch.inf and abs(high) < torch.inf):
            raise ValueError("quantize.fixed_formats: values must be finite, got NaN or infinity; repair the data")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.count += flat.numel()
        some = flat
        if flat.numel() > SAMPLE:
            # Drawn: every so many may be the same column of all images, such as their dark border.
            drawn = torch.randint(flat.numel(), (SAMPLE,), generator=torch.Generator().manual_seed(0))
            some = flat[drawn.to(flat.device)]
        for i, format in enumerate(self.formats):
            self.errors[i] += float((format.nearest(some) - some).double().square().sum())

    def best(self, choose: str) -> FixedFormat:
        """The format of the least error, or the finest that none of the values leaves."""
        if choose == "mse":
            return self.formats[min(range(len(self.errors)), key=self.errors.__getitem__)]
        inside = [f for f in self.formats if f.low <= self.low and self.high <= f.high]
        return inside[0] if inside else self.formats[-1]


@torch.no_grad()
def fixed_formats(
    model: nn.Module,
    data: Iterable[Any],
    bits: int = 16,
    *,
    output_bits: int | None = None,
    choose: Literal["mse", "max"] = "mse",
    targets: Patterns | None = None,
    ignore: Patterns | None = None,
) -> dict[str, FixedFormats]:
    """Chooses <IL,FL> of so many bits for the weight, the input and the output of each layer of a float model.

    The formats are returned, and left at the layers: FixedPointLinear.from_dense(layer) takes them from there, and so
    does tt.convert(model, plan="fixed"), which is how a float model is imported. The model computes what it did.

    Args:
        model: its layers are run in evaluation mode and without gradients.
        data: batches, as prune.obs takes them; seen once.
        bits: of weights and inputs, from 2 to 16.
        output_bits: of outputs, from 2 to 24; bits when left out.
        choose: "mse" for the least squared error, outliers saturating where that pays, of 2^16 values a tensor;
            "max" for the finest format that holds all values.
        targets: which Linear and Conv2d layers, as tt.prune takes them; all of them when left out.
        ignore: which not, the same way.

    Returns:
        Formats by the names of layers. A layer that data does not reach has none, and stays as it is.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is outside its range, a pattern matches nothing, data is empty, or a value is not finite.

    Source:
        Gupta et al. (2015), section 4, chooses formats by hand, for each network; the search is ours.
    """
    where = "quantize.fixed_formats"
    check_int(where, "bits", bits, 2, 16)
    of_outputs = bits if output_bits is None else output_bits
    check_int(where, "output_bits", of_outputs, 2, 24)
    check_choice(where, "choose", choose, ("mse", "max"))
    check_data(where, data, 1)
    chosen = select(where, model, targets, ignore, frozen=True)
    seen: dict[nn.Module, tuple[str, Tensor, Spread, Spread]] = {}
    for target in chosen:
        for module, tensor in target.owners:
            if not isinstance(module, nn.Linear | nn.Conv2d):
                if targets is None:
                    continue
                raise ValueError(
                    f"{where}: {target.name!r} must be a Linear or Conv2d layer, got {type(module).__name__}; pass "
                    f"ignore=[{target.name!r}]"
                )
            name = target.name if module is target.owners[0][0] else f"{target.name} ({len(seen)})"
            seen[module] = name, getattr(module, tensor), Spread(bits), Spread(of_outputs)

    def look(module: nn.Module, args: Any, output: Tensor) -> None:
        name, _, inputs, outputs = seen[module]
        if not args or not isinstance(args[0], Tensor):
            raise TypeError(f"{where}: the input of {name!r} must be a tensor given by position; call the layer so")
        inputs.add(args[0])
        outputs.add(output)

    handles = [module.register_forward_hook(look) for module in seen]
    batches = 0
    try:
        with evaluating(model):
            for batch in data:
                call(model, batch)
                batches += 1
    finally:
        for handle in handles:
            handle.remove()
    if not batches:
        raise ValueError(f"{where}: data must hold at least one batch, got none; pass some")
    found = {}
    for module, (name, weight, inputs, outputs) in seen.items():
        if not outputs.count:
            continue
        of_weight = Spread(bits)
        of_weight.add(weight)
        found[name] = FixedFormats(of_weight.best(choose), inputs.best(choose), outputs.best(choose))
        note_formats(module, found[name])
    return found
