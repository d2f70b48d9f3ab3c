"""How few numbers make a layer's weights, as products."""

from tersetorch.methods.factorize.bicluster import bicluster
from tersetorch.methods.factorize.flatten import flatten, nearest_filters
from tersetorch.methods.factorize.gradient_sizes import gradient_sizes
from tersetorch.methods.factorize.layer_by_layer import frozen_up_to, layer_by_layer
from tersetorch.methods.factorize.monochromatic import monochromatic
from tersetorch.methods.factorize.outer_product import outer_product
from tersetorch.methods.factorize.svd import rank_within, svd, truncated

__all__ = [
    "bicluster",
    "flatten",
    "frozen_up_to",
    "gradient_sizes",
    "layer_by_layer",
    "monochromatic",
    "nearest_filters",
    "outer_product",
    "rank_within",
    "svd",
    "truncated",
]
