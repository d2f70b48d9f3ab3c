"""LeNet-300-100, the fully connected network that the pruning papers begin with."""

from __future__ import annotations

from torch import Tensor, nn

from tersetorch.storage import register_module
from tersetorch.zoo.checks import check_count


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
        if not isinstance(dropout, int | float) or isinstance(dropout, bool):
            raise TypeError(f"LeNet300100: dropout must be a number, got {dropout!r}; pass a rate such as 0.3")
        if not 0 <= dropout < 1:
            raise ValueError(f"LeNet300100: dropout must be in [0, 1), got {dropout}; pass a rate such as 0.3")
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
        x = images.flatten(1)
        if x.shape[1] != self.in_features:
            raise ValueError(
                f"LeNet300100: images must have {self.in_features} values each, got shape {tuple(images.shape)}; "
                "build the network with in_features= your image size"
            )
        x = self.dropout1(self.fc1(x).relu())
        x = self.dropout2(self.fc2(x).relu())
        logits: Tensor = self.fc3(x)
        return logits


def _config(model: LeNet300100) -> dict[str, int | float]:
    return {"in_features": model.in_features, "classes": model.classes, "dropout": model.dropout}


register_module("zoo.LeNet300100", LeNet300100, _config)
