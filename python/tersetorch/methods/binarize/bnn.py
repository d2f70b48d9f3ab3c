"""Binarized neural networks: signs for weights and for activations."""

from __future__ import annotations

from torch import nn

from tersetorch.methods.arguments import check_flag, check_model
from tersetorch.methods.binarize.binary_connect import BinaryConnect, connect
from tersetorch.methods.binarize.binary_weight import Scale
from tersetorch.methods.binarize.signs import Sign
from tersetorch.methods.selection import Patterns

# What a sign takes the place of.
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Tanh, nn.Hardtanh, nn.Sigmoid, nn.Hardsigmoid, nn.SiLU, nn.GELU)


def bnn(
    model: nn.Module,
    targets: Patterns | None = None,
    ignore: Patterns | None = None,
    *,
    stochastic: bool = False,
    scale: Scale = "none",
    glorot: bool = True,
) -> BinaryConnect:
    """Makes weights of model signs, as binary_connect does, and its activation modules binarize.Sign, in place.

    A layer then multiplies signs by signs, but for the first one, whose input stays what it is. The order that works is
    linear or convolution, pooling, batch norm, sign: a batch norm behind the sign, or pooling of signs, learns little.
    Activations that a forward calls as functions (F.relu) are not seen; write them as modules, or call
    tt.binarize.sign.

    Args:
        model: with activation modules: ReLU, ReLU6, LeakyReLU, Tanh, Hardtanh, Sigmoid, Hardsigmoid, SiLU, GELU or
            Sign.
        targets: as binary_connect takes it, and the next one.
        ignore: layers whose weights stay real.
        stochastic: whether training draws the activations' signs; those of the weights are deterministic, as in the
            paper's experiments.
        scale: as binary_connect takes it, and the next one.
        glorot: whether step enlarges changes.

    Returns:
        What is stepped in the loop.

    Raises:
        TypeError, ValueError: as binary_connect, and where model has no activation module.

    Source:
        Hubara et al., Binarized Neural Networks (2016), algorithm 1.
    """
    where = "binarize.bnn"
    check_model(where, model)
    check_flag(where, "stochastic", stochastic)
    found = [
        (module, name, child)
        for module in model.modules()
        for name, child in module._modules.items()  # named_children gives a shared one once
        if isinstance(child, (*ACTIVATIONS, Sign))
    ]
    if not found:
        raise ValueError(
            f"{where}: model must have activation modules, got none; write its activations as modules such as "
            "torch.nn.ReLU, or call binary_connect for signs in the weights alone"
        )
    handle = connect(where, model, targets, ignore, False, scale, glorot)
    signs = {child: Sign(stochastic).train(child.training) for _, _, child in found}
    for module, name, child in found:
        setattr(module, name, signs[child])
    return handle
