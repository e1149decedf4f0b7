"""The seven-layer network of the EASGD experiments on CIFAR-10.

Source: Zhang, Choromanska, LeCun, Deep learning with Elastic Averaging SGD, 2015 (arXiv 1412.6651), section 5: input
(3, 28), then convolution 64, pooling, convolution 128, pooling, convolution 64, fully connected 256 with dropout 0.5,
softmax.

Details that the paper leaves open: kernels of 5x5, 5x5 and 3x3 without padding, 2x2 pooling with stride 2, ReLU. The
softmax is left to the loss. The paper's 28-pixel crops give feature maps of 24, 12, 8, 4 and 2 pixels; whole 32-pixel
images give 28, 14, 10, 5 and 3, and a wider fully connected layer. Images must have at least 24x24 pixels and may have
any number of channels.
"""

from torch import Tensor, nn

from mpitrain.errors import UsageError

SMALLEST = 24  # pixels; the last feature map then has one


class CNN7(nn.Module):
    """Three convolutions, two poolings, two fully connected layers.

    Args:
        shape: The shape of one input, (C, H, W).
        n_classes: The number of outputs.
    """

    def __init__(self, *, shape: tuple[int, ...], n_classes: int) -> None:
        super().__init__()
        if len(shape) != 3 or min(shape[1:]) < SMALLEST:
            given = "x".join(map(str, shape))
            raise UsageError(f"cnn7 needs at least {SMALLEST}x{SMALLEST} pixels, the data is {given}: use mlp")
        self.features = nn.Sequential(
            nn.Conv2d(shape[0], 64, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(128, 64, 3),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.classifier = nn.Sequential(
            nn.Linear(_n_features(shape), 256),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(256, n_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images (b, C, H, W) to logits (b, n_classes)."""
        logits: Tensor = self.classifier(self.features(x))
        return logits


def _n_features(shape: tuple[int, ...]) -> int:
    """Return the number of features after the convolutions."""
    height, width = (((side - 4) // 2 - 4) // 2 - 2 for side in shape[1:])
    return 64 * height * width
