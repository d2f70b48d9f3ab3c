"""How a network of signs is trained."""

from tersetorch.methods.binarize.binary_connect import BinaryConnect, binary_connect
from tersetorch.methods.binarize.bnn import bnn
from tersetorch.methods.binarize.shift_adamax import ShiftAdaMax
from tersetorch.methods.binarize.shift_batch_norm import ShiftBatchNorm1d, ShiftBatchNorm2d
from tersetorch.methods.binarize.signs import Sign, ap2, sign
from tersetorch.methods.binarize.squared_hinge import squared_hinge

__all__ = [
    "BinaryConnect",
    "ShiftAdaMax",
    "ShiftBatchNorm1d",
    "ShiftBatchNorm2d",
    "Sign",
    "ap2",
    "binary_connect",
    "bnn",
    "sign",
    "squared_hinge",
]
