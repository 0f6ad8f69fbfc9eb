"""VGG with batch norm for small images: global average pooling and one linear layer, as in CRD's benchmark.

Layer names are those of its checkpoints: block0.0 (convolution), block0.1 (batch norm), ..., classifier.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from ssdkd.models.initial import he_initialise
from ssdkd.models.pooling import halved
from ssdkd.models.registry import register_model, require_image_size

_POOL_ALSO_FOURTH_FROM = 64  # pixels: there the published networks halve once more


class VGG(nn.Module):
    """Images `(N, in_channels, H, W)` to logits `(N, num_classes)`: five blocks with max pooling between.

    Args:
        blocks: the widths of the convolutions of each of the five blocks.
    """

    def __init__(self, blocks: Sequence[Sequence[int]], num_classes: int, in_channels: int) -> None:
        super().__init__()
        channels = in_channels
        sequences = []
        for widths in blocks:
            layers: list[nn.Module] = []
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            sequences.append(nn.Sequential(*layers))
        self.block0, self.block1, self.block2, self.block3, self.block4 = sequences
        self.classifier = nn.Linear(channels, num_classes)
        he_initialise(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out = halved(self.block0(images))
        out = halved(self.block1(out))
        out = halved(self.block2(out))
        out = self.block3(out)
        if images.shape[-1] >= _POOL_ALSO_FOURTH_FROM:
            out = halved(out)
        features = F.adaptive_avg_pool2d(self.block4(out), 1).flatten(1)
        logits: torch.Tensor = self.classifier(features)
        return logits


@register_model("vgg8")
def vgg8(*, num_classes: int, in_channels: int, image_size: int) -> VGG:
    """One convolution a block."""
    require_image_size("vgg8", image_size, 8)
    return VGG([[64], [128], [256], [512], [512]], num_classes, in_channels)


@register_model("vgg11")
def vgg11(*, num_classes: int, in_channels: int, image_size: int) -> VGG:
    """Configuration A of Simonyan and Zisserman 2015."""
    require_image_size("vgg11", image_size, 8)
    return VGG([[64], [128], [256, 256], [512, 512], [512, 512]], num_classes, in_channels)
