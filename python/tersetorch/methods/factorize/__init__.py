"""How few numbers make a layer's weights, as products."""

from tersetorch.methods.factorize.svd import rank_within, svd, truncated

__all__ = ["rank_within", "svd", "truncated"]
