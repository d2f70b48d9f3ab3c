"""VGG-16, the largest network that the pruning papers compress."""

from __future__ import annotations

from torch import Tensor, fx, nn
from torch.nn import functional

from tersetorch.storage import register_module
from tersetorch.zoo.checks import check_count, check_images

# Channels of the convolutions of each stage; 2x2 max pooling ends a stage.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

# So that torch.fx, and with it convert, can follow a network that looks at its input.
fx.wrap("check_images")


class VGG16(nn.Module):
    """Thirteen 3x3 convolutions and three linear layers: 138,357,544 parameters, 15,470,264,320 MACs an image.

    Takes [N, 3, 224, 224]; gives logits [N, classes]. Layers have the paper's names: conv1_1 to conv5_3, fc6 to fc8.
    Fresh weights are PyTorch's default, which so many layers without normalisation hardly train from: load others.

    Source:
        Simonyan and Zisserman, Very deep convolutional networks for large-scale image recognition (2014), table 1,
        configuration D.
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
        check_count("VGG16", "classes", classes)
        self.classes = classes
        inputs = 3
        for stage, widths in enumerate(STAGES, 1):
            for number, width in enumerate(widths, 1):
                self.add_module(f"conv{stage}_{number}", nn.Conv2d(inputs, width, 3, padding=1))
                self.add_module(f"relu{stage}_{number}", nn.ReLU())
                inputs = width
        self.fc6 = nn.Linear(512 * 7 * 7, 4096)
        self.relu6 = nn.ReLU()
        self.dropout6 = nn.Dropout(0.5)
        self.fc7 = nn.Linear(4096, 4096)
        self.relu7 = nn.ReLU()
        self.dropout7 = nn.Dropout(0.5)
        self.fc8 = nn.Linear(4096, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes] of images [N, 3, 224, 224].

        Raises:
            TypeError, ValueError: images is no tensor of that shape.
        """
        check_images("VGG16", images, 3, 224)
        x = images
        for stage, widths in enumerate(STAGES, 1):
            for number in range(1, len(widths) + 1):
                x = self.get_submodule(f"relu{stage}_{number}")(self.get_submodule(f"conv{stage}_{number}")(x))
            x = functional.max_pool2d(x, 2)
        x = self.dropout6(self.relu6(self.fc6(x.flatten(1))))
        x = self.dropout7(self.relu7(self.fc7(x)))
        logits: Tensor = self.fc8(x)
        return logits


register_module("zoo.VGG16", VGG16, lambda model: {"classes": model.classes})
