"""SqueezeNet, AlexNet's accuracy with a fiftieth of its weights."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from tersetorch.storage import register_module
from tersetorch.zoo.checks import check_count, check_images

Version = Literal["1.0", "1.1"]

# Squeeze and expand channels of fire2 to fire9; each expand convolution has as many.
FIRES = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))
# The fires that max pooling follows. It also follows conv1.
POOLED = {"1.0": (4, 8), "1.1": (3, 5)}
# The least image side with which no pooling window is larger than what it pools.
LEAST = {"1.0": 29, "1.1": 25}

# So that torch.fx, and with it convert, can follow a network that looks at its input.
fx.wrap("check_images")


class SqueezeNet(nn.Module):
    """A convolution, eight fire modules and a 1x1 convolution to the classes, averaged over the image.

    Takes [N, 3, height, width], 227 x 227 in the paper; gives logits [N, classes]. Published weights want BGR images
    from 0 to 255 less the training set's mean, as `caffe_input` makes them.

    | version | parameters | MACs of a 227 x 227 image |
    |---|---|---|
    | 1.0 | 1,248,424 | 861,339,936 |
    | 1.1 | 1,235,496 | 387,747,520 |

    Source:
        Iandola et al., SqueezeNet (2016), table 1, and the files that the authors published: pooling rounds up, conv10
        of version 1.0 has padding 1 and is followed by ReLU. torchvision's has no padding there, hence fewer MACs.
    """

    def __init__(self, version: Version = "1.0", classes: int = 1000) -> None:
        """Draws fresh weights.

        Args:
            version: "1.0" of the paper, or "1.1" with less than half of its MACs.
            classes: logits to compute, at least 1.

        Raises:
            TypeError: classes is not an int.
            ValueError: version is unknown, or classes is less than 1.
        """
        super().__init__()
        if version not in get_args(Version):
            raise ValueError(f"SqueezeNet: version must be '1.0' or '1.1', got {version!r}; pass one of these")
        check_count("SqueezeNet", "classes", classes)
        self.version = version
        self.classes = classes
        self.conv1 = nn.Conv2d(3, 96, 7, stride=2) if version == "1.0" else nn.Conv2d(3, 64, 3, stride=2)
        self.relu1 = nn.ReLU()
        inputs = self.conv1.out_channels
        for number, (squeeze, expand) in enumerate(FIRES, 2):
            self.add_module(f"fire{number}", Fire(inputs, squeeze, expand))
            inputs = 2 * expand
        self.dropout9 = nn.Dropout(0.5)
        self.conv10 = nn.Conv2d(inputs, classes, 1, padding=1 if version == "1.0" else 0)
        self.relu10 = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes] of images [N, 3, height, width].

        Raises:
            TypeError, ValueError: images is no tensor of that shape, or smaller than the poolings need.
        """
        check_images("SqueezeNet", images, 3, least=LEAST[self.version])
        x = _pool(self.relu1(self.conv1(images)))
        for number in range(2, len(FIRES) + 2):
            x = self.get_submodule(f"fire{number}")(x)
            # Not an if: convert fuses ReLUs only where a forward has one path.
            x = (_keep, _pool)[number in POOLED[self.version]](x)
        logits: Tensor = self.relu10(self.conv10(self.dropout9(x))).mean((2, 3))
        return logits


class Fire(nn.Module):
    """s = relu(squeeze(x)); y = [relu(expand1x1(s)), relu(expand3x3(s))], from [N, inputs, ...] to [N, 2 expand, ...].

    Source:
        Iandola et al., SqueezeNet (2016), section 3.2.
    """

    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        """Draws fresh weights.

        Args:
            inputs: channels of x.
            squeeze: channels of s.
            expand: channels of each half of y.
        """
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.squeeze_relu = nn.ReLU()
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand1x1_relu = nn.ReLU()
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)
        self.expand3x3_relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Y of x, both [N, channels, height, width]."""
        s = self.squeeze_relu(self.squeeze(x))
        return torch.cat([self.expand1x1_relu(self.expand1x1(s)), self.expand3x3_relu(self.expand3x3(s))], 1)


def _keep(x: Tensor) -> Tensor:
    return x


def _pool(x: Tensor) -> Tensor:
    return functional.max_pool2d(x, 3, 2, ceil_mode=True)


register_module("zoo.SqueezeNet", SqueezeNet, lambda model: {"version": model.version, "classes": model.classes})
