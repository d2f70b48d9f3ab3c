"""The two networks that binary weights and activations were shown on, as BinaryConnect and BNN have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from torch import Tensor, fx, nn

from tersetorch.methods.binarize import ShiftBatchNorm1d, ShiftBatchNorm2d, Sign
from tersetorch.storage import register_module
from tersetorch.zoo.checks import check_count, check_images, check_rate, check_values

Activation = Literal["relu", "sign", "stochastic sign"]

ACTIVATIONS: dict[Activation, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "sign": Sign,
    "stochastic sign": lambda: Sign(stochastic=True),
}
# The authors' code: Theano's for both papers.
EPS = 1e-4
# Channels of the convolutions, and pooling after every second.
WIDTHS = (1, 1, 2, 2, 4, 4)
FEATURES = 8

# So that torch.fx, and with it convert, can follow a network that looks at its input.
fx.wrap("check_images")
fx.wrap("check_values")


class BinaryMLP(nn.Module):
    """Three hidden layers, each linear, batch norm, activation; and a linear layer with batch norm.

    36,806,656 weights at width 4096, 2,910,208 at 1024. Takes [N, in_features] or images that flatten to it; gives
    scores [N, classes] for squared_hinge. Weights are real until tt.binarize.binary_connect or bnn makes them signs; no
    layer has a bias, which batch norm would take away.

    Source:
        Courbariaux, Bengio, David, BinaryConnect (2015), section 3.1 (width 1024 and ReLU); Hubara et al., Binarized
        Neural Networks (2016), section 2 (width 4096 in Theano, 2048 in Torch, and signs).
    """

    def __init__(
        self,
        in_features: int = 784,
        classes: int = 10,
        width: int = 4096,
        activation: Activation = "relu",
        shift: bool = False,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
    ) -> None:
        """Draws fresh weights.

        Args:
            in_features: values of an image, at least 1.
            classes: scores to compute, at least 1.
            width: units of each hidden layer, at least 1.
            activation: "relu", "sign", or "stochastic sign", which draws in training. tt.binarize.bnn puts signs in the
                place of ReLUs, too.
            shift: whether batch norm is the one by shifts.
            dropout: rate after each hidden layer, in [0, 1).
            input_dropout: rate of the input values, in [0, 1).

        Raises:
            TypeError, ValueError: an argument has the wrong type or is outside its range.
        """
        super().__init__()
        for name, value in (("in_features", in_features), ("classes", classes), ("width", width)):
            check_count("BinaryMLP", name, value)
        _check_choices("BinaryMLP", activation, shift)
        check_rate("BinaryMLP", "dropout", dropout)
        check_rate("BinaryMLP", "input_dropout", input_dropout)
        self.in_features = in_features
        self.classes = classes
        self.width = width
        self.shift = shift
        self.rates = (float(input_dropout), *3 * (float(dropout),))
        norm = ShiftBatchNorm1d if shift else nn.BatchNorm1d
        inputs = in_features
        for number, outputs in enumerate((width, width, width, classes), 1):
            if self.rates[number - 1]:
                self.add_module(f"dropout{number}", nn.Dropout(self.rates[number - 1]))
            self.add_module(f"fc{number}", nn.Linear(inputs, outputs, bias=False))
            self.add_module(f"bn{number}", norm(outputs, eps=EPS))
            if number < 4:
                self.add_module(f"act{number}", ACTIVATIONS[activation]())
            inputs = outputs
        self.order = tuple(self._modules)

    def forward(self, images: Tensor) -> Tensor:
        """Scores [N, classes] of images [N, ...].

        Raises:
            ValueError: an image does not have in_features values.
        """
        check_values("BinaryMLP", images, self.in_features)
        x = images.flatten(1)
        for name in self.order:
            x = self.get_submodule(name)(x)
        return x


class BinaryVGG(nn.Module):
    """2x(128C3)-MP2-2x(256C3)-MP2-2x(512C3)-MP2-2x1024FC-10: 14 million weights, 617 million MACs an image.

    Each layer is followed by batch norm and, but the last, by an activation; pooling comes before batch norm, so that
    it takes the largest of sums, not of signs. Takes [N, 3, 32, 32]; gives scores [N, classes] for squared_hinge.
    Weights are real until tt.binarize.binary_connect or bnn makes them signs; no layer has a bias.

    Source:
        Courbariaux, Bengio, David, BinaryConnect (2015), section 3.2, equation 5 (ReLU); Hubara et al., Binarized
        Neural Networks (2016), section 2 (signs).
    """

    def __init__(
        self, classes: int = 10, channels: int = 128, activation: Activation = "relu", shift: bool = False
    ) -> None:
        """Draws fresh weights.

        Args:
            classes: scores to compute, at least 1.
            channels: of the first convolution, at least 1; the other widths follow in proportion.
            activation: as BinaryMLP takes it, and the next one.
            shift: whether batch norm is the one by shifts.

        Raises:
            TypeError, ValueError: an argument has the wrong type or is outside its range.
        """
        super().__init__()
        check_count("BinaryVGG", "classes", classes)
        check_count("BinaryVGG", "channels", channels)
        _check_choices("BinaryVGG", activation, shift)
        self.classes = classes
        self.channels = channels
        self.shift = shift
        norm1, norm2 = (ShiftBatchNorm1d, ShiftBatchNorm2d) if shift else (nn.BatchNorm1d, nn.BatchNorm2d)
        inputs = 3
        for number, times in enumerate(WIDTHS, 1):
            self.add_module(f"conv{number}", nn.Conv2d(inputs, times * channels, 3, padding=1, bias=False))
            if number % 2 == 0:
                self.add_module(f"pool{number}", nn.MaxPool2d(2))
            self.add_module(f"bn{number}", norm2(times * channels, eps=EPS))
            self.add_module(f"act{number}", ACTIVATIONS[activation]())
            inputs = times * channels
        self.flatten = nn.Flatten()
        inputs *= 4 * 4
        for number, outputs in enumerate((FEATURES * channels, FEATURES * channels, classes), 7):
            self.add_module(f"fc{number}", nn.Linear(inputs, outputs, bias=False))
            self.add_module(f"bn{number}", norm1(outputs, eps=EPS))
            if number < 9:
                self.add_module(f"act{number}", ACTIVATIONS[activation]())
            inputs = outputs
        self.order = tuple(self._modules)

    def forward(self, images: Tensor) -> Tensor:
        """Scores [N, classes] of images [N, 3, 32, 32].

        Raises:
            TypeError, ValueError: images is no tensor of that shape.
        """
        check_images("BinaryVGG", images, 3, 32)
        x = images
        for name in self.order:
            x = self.get_submodule(name)(x)
        return x


def _check_choices(where: str, activation: str, shift: bool) -> None:
    if activation not in get_args(Activation):
        names = ", ".join(map(repr, get_args(Activation)))
        raise ValueError(f"{where}: activation must be one of {names}, got {activation!r}; pass one of these")
    if not isinstance(shift, bool):
        raise TypeError(f"{where}: shift must be True or False, got {shift!r}; pass a bool")


def _activation(model: nn.Module) -> Activation:
    """What stands behind the first layer now, whatever the network was built with."""
    found = model.get_submodule("act1")
    if isinstance(found, Sign):
        return "stochastic sign" if found.stochastic else "sign"
    # Thresholds stand for signs alone.
    return "sign" if isinstance(found, nn.Identity) else "relu"


register_module(
    "zoo.BinaryMLP",
    BinaryMLP,
    lambda model: {
        "in_features": model.in_features,
        "classes": model.classes,
        "width": model.width,
        "activation": _activation(model),
        "shift": model.shift,
        "dropout": model.rates[1],
        "input_dropout": model.rates[0],
    },
)
register_module(
    "zoo.BinaryVGG",
    BinaryVGG,
    lambda model: {
        "classes": model.classes,
        "channels": model.channels,
        "activation": _activation(model),
        "shift": model.shift,
    },
)
