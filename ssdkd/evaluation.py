"""Accuracy on an evaluation set: for the report alone, never seen by training or selection."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ssdkd.models.counting import evaluating

PIXELS = 1000 * 32**2  # looked at at once, so that large images do not take more memory than training by them


@torch.no_grad()
def predictions(
    model: nn.Module,
    images: Tensor,
    mean: Tensor,
    std: Tensor,
    autocast: AbstractContextManager[Any],
) -> Tensor:
    """The class the model names for each image: (N, c, H, W) uint8, mean and std (1, c, 1, 1) -> (N,) int64."""
    batch = max(1, min(1000, PIXELS // (images.shape[2] * images.shape[3])))
    named = []
    with evaluating(model):
        for part in images.split(batch):
            inputs = (part.to(mean.device).float() / 255.0 - mean) / std
            with autocast:
                named.append(model(inputs).argmax(dim=1))
    return torch.cat(named)


def accuracy(named: Tensor, labels: Tensor) -> float:
    """Percent of `named` (N,) that equal `labels` (N,)."""
    return 100.0 * int((named == labels.to(named.device)).sum()) / len(labels)
