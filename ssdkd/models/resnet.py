"""Residual networks for small images, in the two families that data-free distillation publishes with.

- `resnet8`, `resnet20`, `resnet32`, `resnet56`: three stages of 16, 32, 64 channels (He et al. 2016, section
  4.2), and `resnet8x4`, `resnet32x4` with 4 times the channels, as in CRD (Tian et al. 2020).
- `resnet18`, `resnet34`: the four stages of the ImageNet networks behind a 3x3 stem, as in DAFL.

Layer names are those of the checkpoints published with these papers, which differ between the families.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from ssdkd.models.initial import he_initialise
from ssdkd.models.registry import register_model, require_image_size


class BasicBlock(nn.Module):
    """`(N, in_channels, H, W)` to `(N, out_channels, H/stride, W/stride)`: convolutions beside a shortcut.

    Where the shapes differ the shortcut is a 1x1 convolution with batch norm, called `shortcut_name`.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut_name: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut_name = shortcut_name
        self.projects = stride != 1 or in_channels != out_channels
        if self.projects:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.add_module(shortcut_name, nn.Sequential(projection, nn.BatchNorm2d(out_channels)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = getattr(self, self.shortcut_name)(x) if self.projects else x
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + shortcut)


class ResNet(nn.Module):
    """Images `(N, in_channels, H, W)` to logits `(N, num_classes)`; every stage but the first halves H and W.

    Args:
        blocks: blocks of each stage.
        stem: channels before the first stage.
        widths: channels of each stage.
        shortcut_name: what the checkpoints call the projection of a block.
        head_name: what they call the last linear layer.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        stem: int,
        widths: Sequence[int],
        shortcut_name: str,
        head_name: str,
        num_classes: int,
        in_channels: int,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.stage_names = [f"layer{stage}" for stage in range(1, len(widths) + 1)]
        channels = stem
        for stage_name, count, width in zip(self.stage_names, blocks, widths, strict=True):
            stride = 1 if stage_name == "layer1" else 2
            stage = [BasicBlock(channels, width, stride, shortcut_name)]
            stage += [BasicBlock(width, width, 1, shortcut_name) for _ in range(count - 1)]
            self.add_module(stage_name, nn.Sequential(*stage))
            channels = width
        self.head_name = head_name
        self.add_module(head_name, nn.Linear(channels, num_classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(images)))
        for stage_name in self.stage_names:
            out = getattr(self, stage_name)(out)
        features = F.adaptive_avg_pool2d(out, 1).flatten(1)
        logits: torch.Tensor = getattr(self, self.head_name)(features)
        return logits


def _three_stages(name: str, depth: int, widen: int, num_classes: int, in_channels: int, image_size: int) -> ResNet:
    """The first family: `depth` layers, `widen` times the channels; the stem of the wide ones is 32."""
    require_image_size(name, image_size, 4)
    blocks = [(depth - 2) // 6] * 3
    widths = [16 * widen, 32 * widen, 64 * widen]
    stem = 16 if widen == 1 else 32
    model = ResNet(blocks, stem, widths, "downsample", "fc", num_classes, in_channels)
    he_initialise(model)
    return model


@register_model("resnet8")
def resnet8(*, num_classes: int, in_channels: int, image_size: int) -> ResNet:
    """One block a stage."""
    return _three_stages("resnet8", 8, 1, num_classes, in_channels, image_size)


@register_model("resnet20")
def resnet20(*, num_classes: int, in_channels: int, image_size: int) -> ResNet:
    """Three blocks a stage."""
    return _three_stages("resnet20", 20, 1, num_classes, in_channels, image_size)


@register_model("resnet32")
def resnet32(*, num_classes: int, in_channels: int, image_size: int) -> ResNet:
    """Five blocks a stage."""
    return _three_stages("resnet32", 32, 1, num_classes, in_channels, image_size)


@register_model("resnet56")
def resnet56(*, num_classes: int, in_channels: int, image_size: int) -> ResNet:
    """Nine blocks a stage."""
    return _three_stages("resnet56", 56, 1, num_classes, in_channels, image_size)


@register_model("resnet8x4")
def resnet8x4(*, num_classes: int, in_channels: int, image_size: int) -> ResNet:
    """`resnet8` with stages of 64, 128, 256 channels behind a stem of 32."""
    return _three_stages("resnet8x4", 8, 4, num_classes, in_channels, image_size)


@register_model("resnet32x4")
def resnet32x4(*, num_classes: int, in_channels: int, image_size: int) -> ResNet:
    """`resnet32` with stages of 64, 128, 256 channels behind a stem of 32."""
    return _three_stages("resnet32x4", 32, 4, num_classes, in_channels, image_size)


@register_model("resnet18")
def resnet18(*, num_classes: int, in_channels: int, image_size: int) -> ResNet:
    """Two blocks a stage, stages of 64, 128, 256, 512 channels."""
    require_image_size("resnet18", image_size, 8)
    return ResNet([2, 2, 2, 2], 64, [64, 128, 256, 512], "shortcut", "linear", num_classes, in_channels)


@register_model("resnet34")
def resnet34(*, num_classes: int, in_channels: int, image_size: int) -> ResNet:
    """Three, four, six and three blocks, stages of 64, 128, 256, 512 channels."""
    require_image_size("resnet34", image_size, 8)
    return ResNet([3, 4, 6, 3], 64, [64, 128, 256, 512], "shortcut", "linear", num_classes, in_channels)
