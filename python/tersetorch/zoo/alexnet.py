"""AlexNet, the first network that won on ImageNet."""

from __future__ import annotations

from torch import Tensor, fx, nn
from torch.nn import functional

from tersetorch.storage import register_module
from tersetorch.zoo.checks import check_count, check_images

# So that torch.fx, and with it convert, can follow a network that looks at its input.
fx.wrap("check_images")


class AlexNet(nn.Module):
    """Five convolutions and three linear layers: 60,965,224 parameters, 724,406,816 MACs an image.

    Takes [N, 3, 227, 227]; gives logits [N, classes]. conv2, conv4 and conv5 have two groups. Published weights want
    BGR images from 0 to 255 less the training set's mean, as `caffe_input` makes them.

    Source:
        Krizhevsky, Sutskever, Hinton, ImageNet classification with deep convolutional neural networks (2012), as Caffe
        has it (models/bvlc_alexnet), which Han et al. compress (2015): normalisation before pooling, its constant 1
        instead of 2, all on one device.
    """

    def __init__(self, classes: int = 1000) -> None:
        """Draws fresh weights.

        Args:
            classes: logits to compute, at least 1.

        Raises:
            TypeError: classes is not an int.
            ValueError: classes is less than 1.
        """
        super().__init__()
        check_count("AlexNet", "classes", classes)
        self.classes = classes
        self.conv1 = nn.Conv2d(3, 96, 11, stride=4)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(96, 256, 5, padding=2, groups=2)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(256, 384, 3, padding=1)
        self.relu3 = nn.ReLU()
        self.conv4 = nn.Conv2d(384, 384, 3, padding=1, groups=2)
        self.relu4 = nn.ReLU()
        self.conv5 = nn.Conv2d(384, 256, 3, padding=1, groups=2)
        self.relu5 = nn.ReLU()
        self.fc6 = nn.Linear(9216, 4096)
        self.relu6 = nn.ReLU()
        self.dropout6 = nn.Dropout(0.5)
        self.fc7 = nn.Linear(4096, 4096)
        self.relu7 = nn.ReLU()
        self.dropout7 = nn.Dropout(0.5)
        self.fc8 = nn.Linear(4096, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes] of images [N, 3, 227, 227].

        Raises:
            TypeError, ValueError: images is no tensor of that shape.
        """
        check_images("AlexNet", images, 3, 227)
        x = functional.max_pool2d(_normalise(self.relu1(self.conv1(images))), 3, 2)
        x = functional.max_pool2d(_normalise(self.relu2(self.conv2(x))), 3, 2)
        x = self.relu4(self.conv4(self.relu3(self.conv3(x))))
        x = functional.max_pool2d(self.relu5(self.conv5(x)), 3, 2).flatten(1)
        x = self.dropout6(self.relu6(self.fc6(x)))
        x = self.dropout7(self.relu7(self.fc7(x)))
        logits: Tensor = self.fc8(x)
        return logits


def _normalise(x: Tensor) -> Tensor:
    """Normalised x: x / (1 + 1e-4 / 5 * sum of x**2 over the five channels around)**0.75."""
    return functional.local_response_norm(x, 5, alpha=1e-4, beta=0.75, k=1.0)


register_module("zoo.AlexNet", AlexNet, lambda model: {"classes": model.classes})
