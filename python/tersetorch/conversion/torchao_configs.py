"""Our layers by torchao's quantize_: configurations, for models that are put together with its filter functions.

from torchao.quantization import quantize_
from tersetorch.conversion.torchao_configs import CodebookConfig, PruneConfig

quantize_(model, CodebookConfig(bits=4), filter_fn=lambda module, name: "mlp" in name)

quantize_ puts layers into the module that holds them: a model that is one layer itself stays as it is. Where a layer is
refused, those before it have changed, and it and those after it have not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from tersetorch.conversion.convert import convert
from tersetorch.conversion.swap import deep_copy
from tersetorch.methods import finalize, prune, quantize

try:
    from torchao.core.config import AOBaseConfig
    from torchao.quantization.transform_module import register_quantize_module_handler
except ImportError as error:
    raise ModuleNotFoundError(
        "torchao_configs: quantize_ must come from torchao, got no such package; run pip install torchao"
    ) from error

__all__ = ["CodebookConfig", "ConvertConfig", "PruneConfig"]

ITSELF = ""  # a module's own name, as plan= calls it
WEIGHT = "weight"  # its weight's, as targets= does


@dataclass
class ConvertConfig(AOBaseConfig):  # type: ignore[misc]  # torchao has no types
    """Moves a layer onto a kernel; its weight stays what it is, so it must hold zeros or shared values already.

    Attributes:
        format: a format's name as in tersetorch.convert's plan, such as "csr", "bitmap" or "codebook_linear".
    """

    format: str


@dataclass
class PruneConfig(AOBaseConfig):  # type: ignore[misc]  # torchao has no types
    """Prunes a layer by magnitude, without training, and moves it onto a kernel.

    Attributes:
        sparsity: part of its weights, in [0, 1).
        format: as in ConvertConfig; it must suit the layer.
    """

    sparsity: float
    format: str = "csr"


@dataclass
class CodebookConfig(AOBaseConfig):  # type: ignore[misc]  # torchao has no types
    """Shares a layer's weights by an optimal k-means, and moves it onto a kernel.

    Attributes:
        bits: 1 to 8, for 2^bits values.
        format: as in ConvertConfig.
    """

    bits: int = 4
    format: str = "codebook_linear"


@register_quantize_module_handler(ConvertConfig)
def _convert(module: nn.Module, config: ConvertConfig) -> nn.Module:
    return _moved(module, config, lambda layer: layer)


@register_quantize_module_handler(PruneConfig)
def _prune(module: nn.Module, config: PruneConfig) -> nn.Module:
    return _moved(module, config, lambda layer: prune.magnitude(layer, config.sparsity, targets=WEIGHT))


@register_quantize_module_handler(CodebookConfig)
def _share(module: nn.Module, config: CodebookConfig) -> nn.Module:
    return _moved(module, config, lambda layer: quantize.kmeans(layer, config.bits, targets=WEIGHT))


def _moved(
    module: nn.Module, config: ConvertConfig | PruneConfig | CodebookConfig, change: Callable[[nn.Module], nn.Module]
) -> nn.Module:
    """The layer that takes module's place; module itself stays as it is, also where it is refused."""
    where = type(config).__name__
    try:
        return convert(finalize(change(deep_copy(module, verb=where))), plan={ITSELF: config.format})
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"{where}: filter_fn must choose layers that it suits, got a {type(module).__name__} ({error}); "
            "leave it out"
        ) from error
