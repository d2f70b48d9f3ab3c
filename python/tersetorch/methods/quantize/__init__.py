"""How few values a layer's weights share."""

from tersetorch.methods.adoption import adopt
from tersetorch.methods.quantize.binary import binary
from tersetorch.methods.quantize.fixed_formats import fixed_formats
from tersetorch.methods.quantize.fixed_point import fixed_point, switch_fixed_point
from tersetorch.methods.quantize.kmeans import kmeans
from tersetorch.methods.quantize.product import product_quantize
from tersetorch.methods.quantize.residual import residual_quantize
from tersetorch.methods.quantize.vectors import product, residual

__all__ = [
    "adopt",
    "binary",
    "fixed_formats",
    "fixed_point",
    "kmeans",
    "product",
    "product_quantize",
    "residual",
    "residual_quantize",
    "switch_fixed_point",
]
