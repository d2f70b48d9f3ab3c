"""The network that flattened convolutions were shown on, and its dense twin."""

from __future__ import annotations

from torch import Tensor, fx, nn

from tersetorch.nn import FlattenedConv2d
from tersetorch.storage import register_module
from tersetorch.zoo.checks import check_count, check_images, check_rate

KERNEL = 5
STAGES = 2

# So that torch.fx, and with it convert, can follow a network that looks at its input.
fx.wrap("check_images")


class FlattenedCNN(nn.Module):
    """Three 5x5 convolutions of 96, 128 and 256 maps, each with ReLU and 2x2 max pooling, and two linear layers.

    The second and third convolution are two stages of 1-D filters each; the first, whose input has few channels, stays
    dense. All keep the size of the maps. Takes [N, in_channels, size, size]; gives logits [N, classes].

    | 32 x 32 colour images | convolution weights | MACs of these |
    |---|---|---|
    | dense | 1,133,600 | 138,444,800 |
    | flattened | 141,856 | 21,987,328 |

    Source:
        Jin, Dundar, Culurciello, Flattened convolutional neural networks (2014), section 4. Not known from it: the
        units of the hidden linear layer, and where dropout stands; here 256, and before each linear layer.
    """

    def __init__(
        self,
        in_channels: int = 3,
        size: int = 32,
        classes: int = 10,
        widths: tuple[int, int, int] = (96, 128, 256),
        hidden: int = 256,
        dropout: float = 0.5,
        flattened: bool = True,
    ) -> None:
        """Draws fresh weights.

        Args:
            in_channels: of an image, at least 1.
            size: its pixels a side, at least 8.
            classes: logits to compute, at least 1.
            widths: maps of the three convolutions, each at least 1.
            hidden: units of the hidden linear layer, at least 1.
            dropout: rate before each linear layer, in [0, 1).
            flattened: False for the dense twin.

        Raises:
            TypeError, ValueError: an argument has the wrong type or is outside its range.
        """
        super().__init__()
        where = "FlattenedCNN"
        counts = {"in_channels": in_channels, "classes": classes, "hidden": hidden}
        for name, value in counts.items():
            check_count(where, name, value)
        check_count(where, "size", size, least=8)
        if not isinstance(widths, tuple | list) or len(widths) != 3:
            raise TypeError(f"{where}: widths must be three ints, got {widths!r}; pass one for each convolution")
        for width in widths:
            check_count(where, "widths", width)
        check_rate(where, "dropout", dropout)
        if not isinstance(flattened, bool):
            raise TypeError(f"{where}: flattened must be True or False, got {flattened!r}; pass a bool")
        self.in_channels = in_channels
        self.size = size
        self.classes = classes
        self.widths = tuple(widths)
        self.hidden = hidden
        self.rate = float(dropout)
        self.flattened = flattened
        inputs = in_channels
        for number, width in enumerate(widths, 1):
            conv: nn.Module
            if flattened and number > 1:
                conv = FlattenedConv2d(inputs, width, KERNEL, padding="same", stages=STAGES)
            else:
                conv = nn.Conv2d(inputs, width, KERNEL, padding=KERNEL // 2)
            self.add_module(f"conv{number}", conv)
            self.add_module(f"act{number}", nn.ReLU())
            self.add_module(f"pool{number}", nn.MaxPool2d(2))
            inputs = width
        self.flatten = nn.Flatten()
        self.dropout4 = nn.Dropout(self.rate)
        self.fc4 = nn.Linear(inputs * (size // 8) ** 2, hidden)
        self.act4 = nn.ReLU()
        self.dropout5 = nn.Dropout(self.rate)
        self.fc5 = nn.Linear(hidden, classes)
        self.order = tuple(self._modules)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes] of images [N, in_channels, size, size].

        Raises:
            TypeError, ValueError: images is no tensor of that shape.
        """
        check_images("FlattenedCNN", images, self.in_channels, self.size)
        x = images
        for name in self.order:
            x = self.get_submodule(name)(x)
        return x


register_module(
    "zoo.FlattenedCNN",
    FlattenedCNN,
    lambda model: {
        "in_channels": model.in_channels,
        "size": model.size,
        "classes": model.classes,
        "widths": model.widths,
        "hidden": model.hidden,
        "dropout": model.rate,
        "flattened": model.flattened,
    },
)
