"""A plain convolutional network, for 8x8 digits and other tiny images."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from ssdkd.errors import ConfigError
from ssdkd.models.initial import he_initialise
from ssdkd.models.pooling import halved
from ssdkd.models.registry import register_model, require_image_size


class ConvNet(nn.Module):
    """Images `(N, in_channels, H, W)` to logits `(N, num_classes)`.

    Each block is `depth` times a 3x3 convolution, batch norm if wanted, and ReLU; 2x2 max pooling between
    blocks, global average pooling and a linear layer after the last.
    """

    def __init__(self, widths: Sequence[int], depth: int, batch_norm: bool, num_classes: int, in_channels: int) -> None:
        super().__init__()
        blocks = []
        channels = in_channels
        for width in widths:
            layers: list[nn.Module] = []
            for _ in range(depth):
                layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=not batch_norm))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(width))
                layers.append(nn.ReLU())
                channels = width
            blocks.append(nn.Sequential(*layers))
        self.blocks = nn.ModuleList(blocks)
        self.linear = nn.Linear(channels, num_classes)
        if not batch_norm:  # by torch's own weights, values fade from layer to layer, and a run is slow to start
            he_initialise(self, "fan_in")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out = images
        for index, block in enumerate(self.blocks):
            out = block(out if index == 0 else halved(out))
        logits: torch.Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


def _checked(
    name: str,
    widths: Sequence[int],
    depth: int,
    batch_norm: bool,
    num_classes: int,
    in_channels: int,
    image_size: int,
) -> ConvNet:
    proper = isinstance(widths, list | tuple) and len(widths) > 0
    if not proper or any(isinstance(w, bool) or not isinstance(w, int) or w < 1 for w in widths):
        raise ConfigError(f"widths of model {name!r} must be a list of whole numbers above 0, not {widths!r}.")
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise ConfigError(f"depth of model {name!r} must be a whole number above 0, not {depth!r}.")
    require_image_size(name, image_size, 2 ** (len(widths) - 1))
    return ConvNet(widths, depth, batch_norm, num_classes, in_channels)


@register_model("convnet")
def convnet(
    *,
    num_classes: int,
    in_channels: int,
    image_size: int,
    widths: Sequence[int] = (32, 64, 128),
    depth: int = 1,
    batch_norm: bool = True,
) -> ConvNet:
    """One block per number in `widths`."""
    return _checked("convnet", widths, depth, batch_norm, num_classes, in_channels, image_size)


@register_model("convnet_small")
def convnet_small(
    *,
    num_classes: int,
    in_channels: int,
    image_size: int,
    widths: Sequence[int] = (8, 16, 32),
    depth: int = 1,
    batch_norm: bool = True,
) -> ConvNet:
    """`convnet` with a quarter of the channels."""
    return _checked("convnet_small", widths, depth, batch_norm, num_classes, in_channels, image_size)
