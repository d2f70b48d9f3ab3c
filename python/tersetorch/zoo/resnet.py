"""The residual networks for CIFAR-10."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from tersetorch.storage import register_module
from tersetorch.zoo.checks import check_count, check_images


class CifarResNet(nn.Module):
    """A 3x3 convolution, three stages of (depth - 2) / 6 residual blocks of 16, 32 and 64 channels, and a linear layer.

    Takes [N, 3, height, width], 32 x 32 in the paper; gives logits [N, classes].

    | depth | parameters | MACs of a 32 x 32 image |
    |---|---|---|
    | 20 | 269,722 | 40,551,040 |
    | 32 | 464,154 | 68,862,592 |
    | 44 | 658,586 | 97,174,144 |
    | 56 | 853,018 | 125,485,696 |
    | 110 | 1,727,962 | 252,887,680 |

    Modules and state have the names that the weights published for PyTorch have, so that
    `ResNet20().load_state_dict(safetensors.torch.load_file(path))` is all that loads them. Those weights want images
    as `cifar_input` makes them.

    Source:
        He, Zhang, Ren, Sun, Deep residual learning for image recognition (2015), section 4.2, shortcuts of option A.
        The paper does not say where the zero channels of a shortcut go; here half are put on each side, as in the
        implementation that most published weights come from (akamaster/pytorch_resnet_cifar10).
    """

    def __init__(self, depth: int = 20, classes: int = 10) -> None:
        """Draws fresh weights.

        Args:
            depth: layers with weights, 6 n + 2 with n from 1 to 200 (the paper's are 20, 32, 44, 56, 110 and 1202).
            classes: logits to compute, at least 1.

        Raises:
            TypeError: an argument is not an int.
            ValueError: an argument is outside its range.
        """
        super().__init__()
        check_count("CifarResNet", "depth", depth)
        check_count("CifarResNet", "classes", classes)
        if depth % 6 != 2 or not 8 <= depth <= 1202:
            raise ValueError(
                f"CifarResNet: depth must be 6 n + 2 from 8 to 1202, got {depth}; pass 20, 32, 44, 56, 110"
            )
        self.depth = depth
        self.classes = classes
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes] of images [N, 3, height, width].

        Raises:
            TypeError, ValueError: images is no tensor of that shape.
        """
        check_images("CifarResNet", images, 3)
        x = self.bn1(self.conv1(images)).relu()
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class ResidualBlock(nn.Module):
    """y = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), from x [N, inputs, ...] to [N, outputs, ...].

    The shortcut has no parameters (option A): every stride-th pixel, and zeros for the channels that x lacks.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """Draws fresh weights.

        Args:
            inputs: channels of x.
            outputs: channels of y, inputs or twice as many.
            stride: of conv1.
        """
        super().__init__()
        self.stride = stride
        self.added = (outputs - inputs) // 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Y of x, both [N, channels, height, width]."""
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        shortcut = x if self.stride == 1 else x[:, :, :: self.stride, :: self.stride]
        if self.added:
            shortcut = functional.pad(shortcut, (0, 0, 0, 0, self.added, self.added))
        result: Tensor = (y + shortcut).relu()
        return result


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    first = ResidualBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(ResidualBlock(outputs, outputs, 1) for _ in range(blocks - 1)))


register_module("zoo.CifarResNet", CifarResNet, lambda model: {"depth": model.depth, "classes": model.classes})

# The paper's depths by name, each with the argument classes.
ResNet20 = partial(CifarResNet, 20)
ResNet32 = partial(CifarResNet, 32)
ResNet44 = partial(CifarResNet, 44)
ResNet56 = partial(CifarResNet, 56)
ResNet110 = partial(CifarResNet, 110)
