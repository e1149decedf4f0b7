"""ResNet-20 for small images.

Source: He, Zhang, Ren, Sun, Deep Residual Learning for Image Recognition, 2015 (arXiv 1512.03385), section 4.2: a 3x3
convolution, then three stages of three blocks with 16, 32 and 64 filters, where stages two and three start with stride
2, then average pooling and one linear layer. Shortcuts are of option A: they skip pixels and fill new channels with
zeros, so they have no parameters. Weights are initialised as in He et al. 2015 (arXiv 1502.01852).
"""

from torch import Tensor, nn
from torch.nn import functional

from mpitrain.errors import UsageError

WIDTHS = (16, 32, 64)
BLOCKS_PER_STAGE = 3  # 6 n + 2 layers


class Block(nn.Module):
    """A residual block y = relu(s(x) + F(x)), where F has two convolutions and s is the shortcut.

    The shortcut is the identity if the shapes of x and F(x) match.
    """

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.n_new = n_out - n_in
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(n_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, n_in, H, W) to (b, n_out, ceil(H / stride), ceil(W / stride))."""
        y = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        if self.stride > 1 or self.n_new:
            x = x[:, :, :: self.stride, :: self.stride]
            x = functional.pad(x, (0, 0, 0, 0, self.n_new // 2, self.n_new - self.n_new // 2))  # option A
        return functional.relu(x + y)


class ResNet20(nn.Module):
    """ResNet-20: 20 layers, 0.27 million parameters with 10 classes.

    Args:
        shape: The shape of one input, (C, H, W) of any size.
        n_classes: The number of outputs.
    """

    def __init__(self, *, shape: tuple[int, ...], n_classes: int) -> None:
        super().__init__()
        if len(shape) != 3:
            raise UsageError(f"resnet20 needs images (C, H, W), the data is {'x'.join(map(str, shape))}: use mlp")
        blocks: list[nn.Module] = []
        n_in = WIDTHS[0]
        for stage, n_out in enumerate(WIDTHS):
            for block in range(BLOCKS_PER_STAGE):
                blocks.append(Block(n_in, n_out, stride=2 if stage and not block else 1))
                n_in = n_out
        self.conv = nn.Conv2d(shape[0], WIDTHS[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(WIDTHS[0])
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(WIDTHS[-1], n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images (b, C, H, W) to logits (b, n_classes)."""
        y = self.blocks(functional.relu(self.norm(self.conv(x))))
        logits: Tensor = self.linear(y.mean(dim=(2, 3)))
        return logits
