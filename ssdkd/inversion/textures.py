"""Random textures: images made of nothing but chance and the statistics that the teacher's normalisation knows.

Inverted images are where the teacher is sure; textures are where nobody looked. A student that agrees with its
teacher on both has less room left to differ. The teacher labels them like any candidate, and the modulating
function decides whether they are worth keeping.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUPS = 4  # textures of a call share a scale and a shape of line within a group


def random_textures(
    count: int,
    image_shape: tuple[int, int, int],
    mean: Tensor,
    std: Tensor,
    random: torch.Generator,
    host_random: torch.Generator,
) -> Tensor:
    """Smooth random fields, or their level lines in patches, with `mean` and `std` (1, c, 1, 1):
    -> (count, c, H, W) in [0, 1].

    `host_random`, which is not the device's, draws what decides how large a tensor is: nothing waits for the device.

    A field has lines where it crosses zero; drawn with a pen, they are strokes:

        field     ~~^~~v~~        lines   __|__|__
    """
    sizes = [len(rows) for rows in torch.arange(count).tensor_split(GROUPS) if len(rows)]
    parts = [_group(size, image_shape, random, host_random) for size in sizes]
    return (mean + std * torch.cat(parts)).clamp(0.0, 1.0)


def _group(
    count: int, image_shape: tuple[int, int, int], random: torch.Generator, host_random: torch.Generator
) -> Tensor:
    size = min(image_shape[1:])
    chance = torch.rand(3, generator=host_random, device=host_random.device).tolist()
    field = _smooth_field(count, image_shape, size * (0.03 + 0.1 * chance[0]), random)
    if chance[1] < 0.7:
        pen = 0.15 + 0.45 * chance[2]
        patches = _smooth_field(count, image_shape, size * 0.18, random)
        field = torch.exp(-((field / pen) ** 2)) * torch.sigmoid(4.0 * (patches + 0.2))
    field = field - field.mean(dim=(0, 2, 3), keepdim=True)
    return field / (field.square().mean(dim=(0, 2, 3), keepdim=True).sqrt() + 1e-6)


def _smooth_field(count: int, image_shape: tuple[int, int, int], scale: float, random: torch.Generator) -> Tensor:
    """White noise blurred by a Gaussian of `scale` pixels, of variance about 1: -> (count, c, H, W).

    The noise lies `apart` pixels from each other, no further than `scale`, where a Gaussian hardly tells it from noise
    in every pixel: a field's variance differs by at most 0.1 % from place to place. Drawing it takes longest.
    """
    channels, height, width = image_shape
    apart, reach = max(1, int(scale)), max(1, round(2.5 * scale))

    def blur(length: int) -> Tensor:
        """What each of `length` pixels takes of a line of noise: (length, noise)."""
        noise = torch.arange(-(-(length + 2 * reach) // apart), device=random.device) * apart - reach
        offset = noise - torch.arange(length, device=random.device)[:, None]
        kernel = torch.exp(-0.5 * (offset / max(scale, 0.3)) ** 2) * (offset.abs() <= reach)
        return kernel / kernel[0].square().sum().sqrt()  # keeps the variance of white noise

    down, across = blur(height), blur(width)
    noise = torch.randn((count, channels, down.shape[1], across.shape[1]), generator=random, device=random.device)
    return down @ noise @ across.t()  # matrices this small multiply faster than thin kernels fold
