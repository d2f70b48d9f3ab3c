"""Approximates one layer after another, and trains what lies above it after each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from tersetorch.methods.arguments import check_model


def layer_by_layer(
    model: nn.Module,
    layers: Sequence[str],
    approximate: Callable[[nn.Module, str], object],
    retrain: Callable[[nn.Module, str], object],
) -> nn.Module:
    """For each layer in turn: approximates it, freezes it and all below, and has the rest retrained; returns model.

    What is above then learns to do with what the approximation gives. Below is what the model registered before,
    which is the order in which most models call their layers. Where nothing above trains, retrain is not called.
    Afterwards every parameter trains that trained before, those of the new layers too. Running statistics of batch
    normalisation below go on with the data in training mode.

    Example:
        ranks = {"conv1": 6, "conv2": 20}
        tt.factorize.layer_by_layer(
            model,
            ["conv1", "conv2"],
            lambda model, name: tt.factorize.svd(model, ranks[name], targets=name),
            lambda model, name: train(model, epochs=1),
        )

    Args:
        model: any nn.Module.
        layers: paths of modules, from the input up.
        approximate: is given model and a path, and changes the layer there in place.
        retrain: is given model and the path, and trains in place what requires gradients, with an optimizer of its
            own. What the two return is not looked at; an exception passes through and leaves model as it is then, with
            its parameters trainable again.

    Raises:
        TypeError: model is no module, layers no sequence of strings, or a function cannot be called.
        ValueError: layers is empty, holds what is no path, or is not in the model's order.

    Source:
        Denton et al., Exploiting linear structure within convolutional networks (2014), section 4.
    """
    where = "factorize.layer_by_layer"
    check_model(where, model)
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not all(isinstance(each, str) for each in layers):
        raise TypeError(f"{where}: layers must be a list of paths, got {layers!r}; pass names such as ['conv1']")
    for name, function in (("approximate", approximate), ("retrain", retrain)):
        if not callable(function):
            raise TypeError(
                f"{where}: {name} must be callable, got {type(function).__name__}; pass a function of model and path"
            )
    order = [name for name, _ in model.named_modules()]
    if not layers or any(not name or name not in order for name in layers):
        raise ValueError(f"{where}: layers must hold paths of modules in model, got {list(layers)}; pass its names")
    places = [order.index(name) for name in layers]
    if places != sorted(set(places)):
        raise ValueError(f"{where}: layers must be in the model's order, each once, got {list(layers)}; sort them")
    for name in layers:
        approximate(model, name)
        with frozen_up_to(model, name):
            if any(parameter.requires_grad for parameter in model.parameters()):
                retrain(model, name)
    return model


@contextmanager
def frozen_up_to(model: nn.Module, layer: str) -> Iterator[nn.Module]:
    """Inside the with block, what the model registered up to and with that layer requires no gradient.

    Gradients that are there go, so that an optimizer leaves the frozen as they are. Parameters that something above
    shares are frozen too. Afterwards every parameter that was frozen here requires gradients again.

    Args:
        model: any nn.Module.
        layer: the path of a module.

    Raises:
        TypeError: model is no module.
        ValueError: model has no such module.

    Source:
        Denton et al. (2014), section 4.
    """
    where = "factorize.frozen_up_to"
    check_model(where, model)
    modules = dict(model.named_modules())
    if layer not in modules or not layer:
        raise ValueError(f"{where}: layer must be the path of a module in model, got {layer!r}; pass a name")
    frozen = []
    inside = False
    for name, module in model.named_modules():
        within = name == layer or name.startswith(f"{layer}.")
        if inside and not within:
            break
        inside = within
        # A module around the layer has parameters of its own, which are no part of what is below.
        if not layer.startswith(f"{name}.") and name:
            frozen += [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        yield model
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
