"""Wide residual networks (Zagoruyko and Komodakis 2016): batch norm and ReLU come before each convolution.

Layer names are those of the checkpoints published with zero-shot and contrastive data-free distillation.
"""

import torch
from torch import nn
from torch.nn import functional as F

from ssdkd.models.initial import he_initialise
from ssdkd.models.registry import register_model, require_image_size


class PreActivationBlock(nn.Module):
    """`(N, in_channels, H, W)` to `(N, out_channels, H/stride, W/stride)`: convolutions beside a shortcut.

    Where the channels differ, shortcut and convolutions both start from the activated input.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.convShortcut = (
            None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activated = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        out: torch.Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return out + shortcut


class Stage(nn.Module):
    """Blocks of one width, of which the first changes the shape; `layer` is what checkpoints call them."""

    def __init__(self, count: int, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        blocks = [PreActivationBlock(in_channels, out_channels, stride)]
        blocks += [PreActivationBlock(out_channels, out_channels, 1) for _ in range(count - 1)]
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """Images `(N, in_channels, H, W)` to logits `(N, num_classes)`; `depth` is 6n + 4."""

    def __init__(self, depth: int, widen: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        count = (depth - 4) // 6
        first, second, third = 16 * widen, 32 * widen, 64 * widen
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.block1 = Stage(count, 16, first, 1)
        self.block2 = Stage(count, first, second, 2)
        self.block3 = Stage(count, second, third, 2)
        self.bn1 = nn.BatchNorm2d(third)
        self.fc = nn.Linear(third, num_classes)
        he_initialise(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(images))))
        features = F.adaptive_avg_pool2d(F.relu(self.bn1(out)), 1).flatten(1)
        logits: torch.Tensor = self.fc(features)
        return logits


@register_model("wrn16_1")
def wrn16_1(*, num_classes: int, in_channels: int, image_size: int) -> WideResNet:
    """16 layers of the plain width."""
    require_image_size("wrn16_1", image_size, 4)
    return WideResNet(16, 1, num_classes, in_channels)


@register_model("wrn16_2")
def wrn16_2(*, num_classes: int, in_channels: int, image_size: int) -> WideResNet:
    """16 layers of twice the width."""
    require_image_size("wrn16_2", image_size, 4)
    return WideResNet(16, 2, num_classes, in_channels)


@register_model("wrn40_1")
def wrn40_1(*, num_classes: int, in_channels: int, image_size: int) -> WideResNet:
    """40 layers of the plain width."""
    require_image_size("wrn40_1", image_size, 4)
    return WideResNet(40, 1, num_classes, in_channels)


@register_model("wrn40_2")
def wrn40_2(*, num_classes: int, in_channels: int, image_size: int) -> WideResNet:
    """40 layers of twice the width."""
    require_image_size("wrn40_2", image_size, 4)
    return WideResNet(40, 2, num_classes, in_channels)
