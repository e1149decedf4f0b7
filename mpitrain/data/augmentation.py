"""Random crops and reflections of a whole batch at once.

Source: He, Zhang, Ren, Sun, Deep Residual Learning for Image Recognition, 2015 (arXiv 1512.03385), section 4.2: "4
pixels are padded on each side, and a 32x32 crop is randomly sampled from the padded image or its horizontal flip". As
there, the padding is zero after the mean has been subtracted, so `augment` is applied to normalised images.
"""

import torch
from torch import Tensor
from torch.nn import functional


def augment(images: Tensor, generator: torch.Generator, *, padding: int = 4, flip: bool = True) -> Tensor:
    """Return a new batch with randomly cropped and reflected images. Local.

    Args:
        images: (b, C, H, W) float32, normalised, on any device.
        generator: The random generator, on the CPU. Each rank needs its own.
        padding: The number of pixels that are added on each side before an image is cropped to its original size. With
            0, images are not cropped.
        flip: Whether to reflect half of the images, which is unsuitable for digits.

    Returns:
        A tensor of the same shape, dtype and device.
    """
    b, c, height, width = images.shape
    rows = torch.arange(height).expand(b, -1)  # (b, H): the row of the padded image that becomes each row
    columns = torch.arange(width).expand(b, -1)  # (b, W)
    if flip:
        mirrored = torch.randint(0, 2, (b, 1), generator=generator).bool()
        columns = torch.where(mirrored, columns.flip(-1), columns)
    if padding:
        top, left = torch.randint(0, 2 * padding + 1, (2, b, 1), generator=generator)
        rows, columns = rows + top, columns + left
    pixels = (rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]).reshape(b, 1, -1).to(images.device)
    padded = functional.pad(images, (padding,) * 4).reshape(b, c, -1)
    return padded.gather(2, pixels.expand(-1, c, -1)).reshape(images.shape)
