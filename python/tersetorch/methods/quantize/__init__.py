"""How few values a layer's weights share."""

from tersetorch.methods.adoption import adopt
from tersetorch.methods.quantize.binary import binary
from tersetorch.methods.quantize.kmeans import kmeans

__all__ = ["adopt", "binary", "kmeans"]
