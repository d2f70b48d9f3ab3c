"""SqueezeNet, AlexNet's accuracy with a fiftieth of its weights."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from tersetorch.storage import register_module
from tersetorch.zoo.checks import check_count, check_images

Version = Literal["1.0", "1.1"]
Bypass = Literal["simple", "complex"]

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

    A bypass adds a fire's input to its output: "simple" around fire3, 5, 7 and 9, whose channels agree; "complex" also
    around the others, through a 1x1 convolution to as many channels.

    | version | bypass | parameters | MACs of a 227 x 227 image |
    |---|---|---|---|
    | 1.0 | none, simple | 1,248,424 | 861,339,936 |
    | 1.0 | complex | 1,589,672 | 1,212,625,184 |
    | 1.1 | none, simple | 1,235,496 | 387,747,520 |
    | 1.1 | complex | 1,572,648 | 496,930,496 |

    Source:
        Iandola et al., SqueezeNet (2016), table 1, section 6 and table 3, and the files that the authors published:
        pooling rounds up, conv10 of version 1.0 has padding 1 and is followed by ReLU. torchvision's has no padding
        there, hence fewer MACs. Table 3 gives the complex bypass 7.7 MB; what its text describes takes 6.1.
    """

    def __init__(self, version: Version = "1.0", classes: int = 1000, bypass: Bypass | None = None) -> None:
        """Draws fresh weights.

        Args:
            version: "1.0" of the paper, or "1.1" with less than half of its MACs.
            classes: logits to compute, at least 1.
            bypass: "simple", "complex" or None.

        Raises:
            TypeError: classes is not an int.
            ValueError: version or bypass is unknown, or classes is less than 1.
        """
        super().__init__()
        if version not in get_args(Version):
            raise ValueError(f"SqueezeNet: version must be '1.0' or '1.1', got {version!r}; pass one of these")
        check_count("SqueezeNet", "classes", classes)
        if bypass not in (None, *get_args(Bypass)):
            raise ValueError(
                f"SqueezeNet: bypass must be 'simple', 'complex' or None, got {bypass!r}; pass one of these"
            )
        self.version = version
        self.classes = classes
        self.bypass = bypass
        self.conv1 = nn.Conv2d(3, 96, 7, stride=2) if version == "1.0" else nn.Conv2d(3, 64, 3, stride=2)
        self.relu1 = nn.ReLU()
        inputs = self.conv1.out_channels
        for number, (squeeze, expand) in enumerate(FIRES, 2):
            around = _bypass(bypass, inputs, 2 * expand)
            fire = Fire(inputs, squeeze, expand) if around is None else BypassedFire(inputs, squeeze, expand, around)
            self.add_module(f"fire{number}", fire)
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


class BypassedFire(Fire):
    """A fire module whose input, as it is or through a layer, is added to its output: y = fire(x) + bypass(x).

    Source:
        Iandola et al., SqueezeNet (2016), section 6.
    """

    def __init__(self, inputs: int, squeeze: int, expand: int, bypass: nn.Module) -> None:
        """Draws fresh weights.

        Args:
            inputs: as Fire takes it.
            squeeze: as Fire takes it.
            expand: as Fire takes it.
            bypass: from [N, inputs, ...] to [N, 2 expand, ...].
        """
        super().__init__(inputs, squeeze, expand)
        self.bypass = bypass

    def forward(self, x: Tensor) -> Tensor:
        """Y of x, both [N, channels, height, width]."""
        y: Tensor = super().forward(x) + self.bypass(x)
        return y


def _bypass(kind: Bypass | None, inputs: int, outputs: int) -> nn.Module | None:
    """What goes around a fire from inputs to outputs channels; None for nothing."""
    if kind is not None and inputs == outputs:
        return nn.Identity()
    return nn.Conv2d(inputs, outputs, 1) if kind == "complex" else None


def _config(model: SqueezeNet) -> dict[str, str | int]:
    # Without a bypass nothing is said of it, as in files from before there was one.
    bypass = {} if model.bypass is None else {"bypass": model.bypass}
    return {"version": model.version, "classes": model.classes, **bypass}


def _keep(x: Tensor) -> Tensor:
    return x


def _pool(x: Tensor) -> Tensor:
    return functional.max_pool2d(x, 3, 2, ceil_mode=True)


register_module("zoo.SqueezeNet", SqueezeNet, _config)
