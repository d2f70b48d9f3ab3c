"""MobileNet, whose work is nearly all in 1x1 convolutions."""

from __future__ import annotations

import math

from torch import Tensor, fx, nn

from tersetorch.storage import register_module
from tersetorch.zoo.checks import check_count, check_images

# Output channels at width 1 and stride of each depthwise-separable block.
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))

# So that torch.fx, and with it convert, can follow a network that looks at its input.
fx.wrap("check_images")


class MobileNet(nn.Module):
    """A 3x3 convolution, thirteen pairs of a 3x3 depthwise and a 1x1 convolution, and a linear layer.

    Takes [N, 3, height, width], 224 x 224 in the paper; gives logits [N, classes].

    | width | parameters | MACs of a 224 x 224 image |
    |---|---|---|
    | 1.0 | 4,231,976 | 568,740,352 |
    | 0.75 | 2,585,560 | 325,400,448 |
    | 0.5 | 1,331,592 | 149,497,088 |
    | 0.25 | 470,072 | 41,030,272 |

    Source:
        Howard et al., MobileNets (2017), table 1. The table gives the last depthwise convolution stride 2; as in the
        authors' code, and as its own input and output sizes say, it has stride 1.
    """

    def __init__(self, width: float = 1.0, classes: int = 1000) -> None:
        """Draws fresh weights.

        Args:
            width: every layer has int(width * c) channels where the paper has c, and at least 8.
            classes: logits to compute, at least 1.

        Raises:
            TypeError: width is no number, or classes is not an int.
            ValueError: width is not in (0, 16], or classes is less than 1.
        """
        super().__init__()
        if not isinstance(width, int | float) or isinstance(width, bool):
            raise TypeError(f"MobileNet: width must be a number, got {width!r}; pass a factor such as 0.5")
        if not (math.isfinite(width) and 0 < width <= 16):
            raise ValueError(f"MobileNet: width must be in (0, 16], got {width}; pass a factor such as 0.5")
        check_count("MobileNet", "classes", classes)
        self.width = float(width)
        self.classes = classes
        inputs = max(8, int(width * 32))
        self.stem = _convolution(3, inputs, 3, stride=2)
        blocks = []
        for channels, stride in BLOCKS:
            outputs = max(8, int(width * channels))
            depthwise = _convolution(inputs, inputs, 3, stride, groups=inputs)
            blocks.append(nn.Sequential(*depthwise, *_convolution(inputs, outputs, 1)))
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes] of images [N, 3, height, width].

        Raises:
            TypeError, ValueError: images is no tensor of that shape.
        """
        check_images("MobileNet", images, 3)
        logits: Tensor = self.linear(self.blocks(self.stem(images)).mean((2, 3)))
        return logits


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


register_module("zoo.MobileNet", MobileNet, lambda model: {"width": model.width, "classes": model.classes})
