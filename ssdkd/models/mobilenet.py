"""MobileNetV2 (Sandler et al. 2018) for small images.

Layer names and shapes are torchvision's. Strides carry no weights, so mind them when loading a checkpoint:
one trained with torchvision's own strides needs `reduction=32`.
"""

import torch
from torch import nn
from torch.nn import functional as F

from ssdkd.errors import ConfigError
from ssdkd.models.initial import he_initialise
from ssdkd.models.registry import register_model, require_image_size

#        expansion, channels, blocks, stride in the network for ImageNet
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_STEM, _LAST = 32, 1280
_REDUCTIONS = (8, 16, 32)


def _divisible_by_8(channels: float) -> int:
    """The nearest multiple of 8 that loses no more than a tenth of the channels."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def _normalised(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU6())


class InvertedResidual(nn.Module):
    """`(N, in_channels, H, W)` to `(N, out_channels, H/stride, W/stride)`: widen, filter, narrow."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = [] if expansion == 1 else [_normalised(in_channels, hidden, 1)]
        layers.append(_normalised(hidden, hidden, 3, stride, groups=hidden))
        layers += [nn.Conv2d(hidden, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)]
        self.conv = nn.Sequential(*layers)
        self.adds_input = stride == 1 and in_channels == out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.conv(x)
        return x + out if self.adds_input else out


class MobileNetV2(nn.Module):
    """Images `(N, in_channels, H, W)` to logits `(N, num_classes)`; H and W shrink by `reduction`."""

    def __init__(self, width: float, reduction: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        # Small images are worth their full resolution in the first layers.
        stem_stride = 2 if reduction == 32 else 1
        second_stride = 2 if reduction >= 16 else 1
        channels = _divisible_by_8(_STEM * width)
        layers: list[nn.Module] = [_normalised(in_channels, channels, 3, stem_stride)]
        for stage, (expansion, base, count, imagenet_stride) in enumerate(_STAGES, start=1):
            out_channels = _divisible_by_8(base * width)
            stride = second_stride if stage == 2 else imagenet_stride
            for block in range(count):
                layers.append(InvertedResidual(channels, out_channels, stride if block == 0 else 1, expansion))
                channels = out_channels
        last = _divisible_by_8(_LAST * max(1.0, width))
        layers.append(_normalised(channels, last, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, num_classes))
        he_initialise(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = F.adaptive_avg_pool2d(self.features(images), 1).flatten(1)
        logits: torch.Tensor = self.classifier(features)
        return logits


@register_model("mobilenet_v2")
def mobilenet_v2(
    *, num_classes: int, in_channels: int, image_size: int, width: float = 1.0, reduction: int = 8
) -> MobileNetV2:
    """`width` times the channels of the original; the last map is `reduction` times smaller than images."""
    if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width <= 16:
        raise ConfigError(f"width of model 'mobilenet_v2' must be a number above 0 and up to 16, not {width!r}.")
    if reduction not in _REDUCTIONS:
        raise ConfigError(f"reduction of model 'mobilenet_v2' must be 8, 16 or 32, not {reduction!r}.")
    require_image_size("mobilenet_v2", image_size, reduction)
    return MobileNetV2(width, reduction, num_classes, in_channels)
