"""Generators: latents and target classes in, images in [0, 1] out."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ConvGenerator(nn.Module):
    """A linear layer to a small map, then up-sampling convolutions; from 4 to 8 pixels to the image size.

    With `conditional`, a learned embedding of the target class joins the latent, so that a handful of
    adaptation steps is spent on the image rather than on finding the class.
    """

    def __init__(
        self, latent: int, image_shape: tuple[int, int, int], num_classes: int, width: int, conditional: bool
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
        for i in range(doublings):
            out = width if i == doublings - 1 else 2 * width
            layers += [
                nn.Upsample(scale_factor=2),
                nn.Conv2d(2 * width, out, 3, padding=1, bias=False),
                nn.BatchNorm2d(out),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        layers.append(nn.Conv2d(width, channels, 3, padding=1))
        self.body = nn.Sequential(*layers)

    def forward(self, latents: Tensor, targets: Tensor) -> Tensor:
        """(B, latent), (B,) int64 -> (B, channels, H, W) in [0, 1]."""
        if self.embedding is not None:
            latents = latents + self.embedding(targets)
        x = self.project(latents).view(-1, *self.start)
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.body(x)
        height, width = self.image_size
        return torch.sigmoid(x[..., :height, :width].float())


def standard_latents(count: int, latent: int, generator: torch.Generator) -> Tensor:
    """Fresh latents (count, latent), standard normal."""
    return torch.randn((count, latent), generator=generator, device=generator.device)


def to_bytes(images: Tensor) -> Tensor:
    """(B, c, H, W) in [0, 1] -> (B, H, W, c) uint8, rounded."""
    return (images.detach() * 255.0).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
