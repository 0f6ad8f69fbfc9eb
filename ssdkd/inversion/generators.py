"""Generators: latents and target classes in, images in [0, 1] out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ConvGenerator(nn.Module):
    """A linear layer to a small map of 4 to 8 pixels, then up-sampling convolutions to the image size.

        latent -> [2w, 7, 7] -> up, conv [2w, 14, 14] -> last doubling -> [channels, 28, 28] -> sigmoid

    With `subpixel` the last doubling is a pixel shuffle, so that no convolution runs at full size, which makes
    the generator several times cheaper; without it, an up-sampling and two more convolutions. With
    `conditional`, a learned embedding of the target class joins the latent.

    The output is a sigmoid; or, with `pixels`, the mean and standard deviation (1, c, 1, 1) that the teacher's
    normalisation knows of its data, a batch whose pixels have just these statistics before they are clipped.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        latent: int,
        image_shape: tuple[int, int, int],
        num_classes: int,
        width: int,
        conditional: bool = False,
        subpixel: bool = True,
        pixels: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        channels, height, width_px = image_shape
        self.image_size = (height, width_px)
        doublings = 1
        while max(height, width_px) / 2**doublings > 8:
            doublings += 1
        scale = 2**doublings
        self.start = (2 * width, -(-height // scale), -(-width_px // scale))
        self.embedding = nn.Embedding(num_classes, latent) if conditional else None
        self.project = nn.Linear(latent, self.start[0] * self.start[1] * self.start[2])
        layers: list[nn.Module] = [nn.BatchNorm2d(2 * width)]
        for _ in range(doublings - 1):
            layers += [nn.Upsample(scale_factor=2), *_convolution(2 * width, 2 * width)]
        if subpixel:
            layers += _convolution(2 * width, 2 * width) if doublings == 1 else []
            layers += [nn.Conv2d(2 * width, 4 * channels, 3, padding=1), nn.PixelShuffle(2)]
        else:
            layers += [nn.Upsample(scale_factor=2), *_convolution(2 * width, width)]
            layers.append(nn.Conv2d(width, channels, 3, padding=1))
        self.body = nn.Sequential(*layers)
        mean, std = pixels if pixels is not None else (None, None)
        self.register_buffer("pixel_mean", mean, persistent=False)
        self.register_buffer("pixel_std", std, persistent=False)
        self.standardise = nn.BatchNorm2d(channels, affine=False) if pixels is not None else None

    def forward(self, latents: Tensor, targets: Tensor) -> Tensor:
        """(B, latent), (B,) int64 -> (B, channels, H, W) in [0, 1]."""
        if self.embedding is not None:
            latents = latents + self.embedding(targets)
        x = self.project(latents).view(-1, *self.start)
        x = x.contiguous(memory_format=torch.channels_last)
        height, width = self.image_size
        x = self.body(x)[..., :height, :width].float()
        if self.standardise is None:
            return torch.sigmoid(x)
        return _Clip.apply(self.pixel_mean + self.pixel_std * self.standardise(x))  # type: ignore[no-any-return]


class _Clip(torch.autograd.Function):
    """Clip to [0, 1]; outside, a tenth of the gradient leads back, so that no pixel is lost for good."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0.0, 1.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where((x < 0.0) | (x > 1.0), 0.1 * gradient, gradient)


def _convolution(channels: int, out: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, out, 3, padding=1, bias=False),
        nn.BatchNorm2d(out),
        nn.LeakyReLU(0.2, inplace=True),
    ]


def standard_latents(count: int, latent: int, generator: torch.Generator) -> Tensor:
    """Fresh latents (count, latent), standard normal."""
    return torch.randn((count, latent), generator=generator, device=generator.device)


def to_bytes(images: Tensor) -> Tensor:
    """(B, c, H, W) in [0, 1] -> (B, H, W, c) uint8, rounded."""
    return (images.detach() * 255.0).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
