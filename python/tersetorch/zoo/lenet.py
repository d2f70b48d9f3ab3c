"""The two LeNets that the pruning papers begin with."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from tersetorch.storage import register_module
from tersetorch.zoo.checks import check_count, check_images, check_rate, check_values


class LeNet300100(nn.Module):
    """Two hidden layers of 300 and 100 units: fc3(relu(fc2(relu(fc1(x))))), 266,610 parameters on 28 x 28 images.

    Takes [N, in_features] or images that flatten to it, such as [N, 1, 28, 28]; gives logits [N, classes].

    Source:
        LeCun, Bottou, Bengio, Haffner, Gradient-based learning applied to document recognition (1998), section III.C
        (28x28-300-100-10); ReLU and dropout as in Han et al., Learning both weights and connections (2015).
    """

    def __init__(self, in_features: int = 784, classes: int = 10, dropout: float = 0.0) -> None:
        """Draws fresh weights.

        Args:
            in_features: pixels of an image, at least 1.
            classes: logits to compute, at least 1.
            dropout: rate after each hidden layer, in [0, 1).

        Raises:
            TypeError: in_features or classes is not an int, or dropout is no number.
            ValueError: an argument is outside its range.
        """
        super().__init__()
        check_count("LeNet300100", "in_features", in_features)
        check_count("LeNet300100", "classes", classes)
        check_rate("LeNet300100", "dropout", dropout)
        self.in_features = in_features
        self.classes = classes
        self.dropout = float(dropout)
        self.fc1 = nn.Linear(in_features, 300)
        self.dropout1 = nn.Dropout(dropout)
        self.fc2 = nn.Linear(300, 100)
        self.dropout2 = nn.Dropout(dropout)
        self.fc3 = nn.Linear(100, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes] of images [N, ...].

        Raises:
            ValueError: an image does not have in_features values.
        """
        check_values("LeNet300100", images, self.in_features)
        x = self.dropout1(self.fc1(images.flatten(1)).relu())
        x = self.dropout2(self.fc2(x).relu())
        logits: Tensor = self.fc3(x)
        return logits


class LeNet5(nn.Module):
    """Two 5x5 convolutions and two linear layers, 20-50-500-classes: 431,080 parameters, 2,293,000 MACs an image.

    Takes [N, 1, 28, 28]; gives logits [N, classes]. Each convolution is followed by 2x2 max pooling and by no ReLU;
    the first linear layer is followed by one, and by dropout if that is asked for. fc1 and fc2 are Caffe's ip1 and ip2.

    Source:
        Caffe's variant (examples/mnist/lenet.prototxt), which Han et al. (2015) and Guo et al. (2016) prune, of LeCun,
        Bottou, Bengio, Haffner, Gradient-based learning applied to document recognition (1998), section II.B.
    """

    def __init__(self, classes: int = 10, dropout: float = 0.0) -> None:
        """Draws fresh weights.

        Args:
            classes: logits to compute, at least 1.
            dropout: rate after the hidden layer, in [0, 1).

        Raises:
            TypeError: classes is not an int, or dropout is no number.
            ValueError: an argument is outside its range.
        """
        super().__init__()
        check_count("LeNet5", "classes", classes)
        check_rate("LeNet5", "dropout", dropout)
        self.classes = classes
        self.dropout = float(dropout)
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.dropout1 = nn.Dropout(dropout)
        self.fc2 = nn.Linear(500, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes] of images [N, 1, 28, 28].

        Raises:
            TypeError, ValueError: images is no tensor of that shape.
        """
        check_images("LeNet5", images, 1, 28)
        x = functional.max_pool2d(self.conv1(images), 2)
        x = functional.max_pool2d(self.conv2(x), 2)
        logits: Tensor = self.fc2(self.dropout1(self.fc1(x.flatten(1)).relu()))
        return logits


def _config(model: LeNet300100) -> dict[str, int | float]:
    return {"in_features": model.in_features, "classes": model.classes, "dropout": model.dropout}


register_module("zoo.LeNet300100", LeNet300100, _config)
register_module("zoo.LeNet5", LeNet5, lambda model: {"classes": model.classes, "dropout": model.dropout})
