"""LeNet-5 and its half, teacher and student of DAFL (Chen et al. 2019) and many papers after it.

Layer names are those of the published checkpoints: conv1, conv2, conv3, fc1, fc2. The convolutions reduce
exactly 32x32 pixels to one, so the image size is fixed; 28x28 images are framed by two pixels of zeros.
"""

import torch
from torch import nn
from torch.nn import functional as F

from ssdkd.errors import ConfigError
from ssdkd.models.initial import he_initialise
from ssdkd.models.pooling import halved
from ssdkd.models.registry import register_model

_CANVAS = 32
_IMAGE_SIZES = (28, 32)


class _Framed(nn.Conv2d):
    """A convolution that sees 28x28 images in a frame of zeros, without a copy of them."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        frame = (_CANVAS - images.shape[-1]) // 2
        return F.conv2d(images, self.weight, self.bias, padding=(frame, frame))


class LeNet5(nn.Module):
    """Images `(N, in_channels, 28 or 32, 28 or 32)` to logits `(N, num_classes)`.

    Three 5x5 convolutions with ReLU, 2x2 max pooling after the first two, and two linear layers.

    Args:
        name: what the user called the model, for messages.
        widths: outputs of conv1, conv2, conv3 and fc1.
        batch_norm: normalise after each convolution.
    """

    def __init__(
        self,
        name: str,
        widths: tuple[int, int, int, int],
        batch_norm: bool,
        num_classes: int,
        in_channels: int,
        image_size: int,
    ) -> None:
        super().__init__()
        if image_size not in _IMAGE_SIZES:
            raise ConfigError(
                f"model {name!r} cannot take {image_size}x{image_size} images: its size is fixed, they must "
                "be 28x28 or 32x32."
            )
        first, second, third, hidden = widths
        self.conv1 = _Framed(in_channels, first, 5, bias=not batch_norm)
        self.conv2 = nn.Conv2d(first, second, 5, bias=not batch_norm)
        self.conv3 = nn.Conv2d(second, third, 5, bias=not batch_norm)
        self.bn1 = nn.BatchNorm2d(first) if batch_norm else nn.Identity()
        self.bn2 = nn.BatchNorm2d(second) if batch_norm else nn.Identity()
        self.bn3 = nn.BatchNorm2d(third) if batch_norm else nn.Identity()
        self.fc1 = nn.Linear(third, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)
        if not batch_norm:
            he_initialise(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out = F.relu(halved(self.bn1(self.conv1(images))))  # the same as ReLU first, on a quarter of the values
        out = F.relu(halved(self.bn2(self.conv2(out))))
        out = F.relu(self.bn3(self.conv3(out))).flatten(1)
        logits: torch.Tensor = self.fc2(F.relu(self.fc1(out)))
        return logits


_FULL = (6, 16, 120, 84)
_HALF = (3, 8, 60, 42)


@register_model("lenet5")
def lenet5(*, num_classes: int, in_channels: int, image_size: int) -> LeNet5:
    """LeNet-5 without batch norm."""
    return LeNet5("lenet5", _FULL, False, num_classes, in_channels, image_size)


@register_model("lenet5_half")
def lenet5_half(*, num_classes: int, in_channels: int, image_size: int) -> LeNet5:
    """Half the channels of `lenet5`."""
    return LeNet5("lenet5_half", _HALF, False, num_classes, in_channels, image_size)


@register_model("lenet5_bn")
def lenet5_bn(*, num_classes: int, in_channels: int, image_size: int) -> LeNet5:
    """`lenet5` with batch norm after each convolution, so that its statistics can guide inversion."""
    return LeNet5("lenet5_bn", _FULL, True, num_classes, in_channels, image_size)


@register_model("lenet5_half_bn")
def lenet5_half_bn(*, num_classes: int, in_channels: int, image_size: int) -> LeNet5:
    """Half the channels of `lenet5_bn`."""
    return LeNet5("lenet5_half_bn", _HALF, True, num_classes, in_channels, image_size)
