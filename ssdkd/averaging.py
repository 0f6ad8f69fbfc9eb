"""The mean of a student's weights over its last steps: what is measured and handed out while the student learns on.

A student that takes large steps swings around the place it is drawn to; the mean of where it has been is nearer to
that place than any one of its steps, at any moment of a run. So the learning rate need not fall for it, and the steps
that a falling rate would have made small still teach.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Average:
    """Keeps one network at the running mean of another, over about the last `share` of all steps so far.

    Step t counts for 1 / (1 + share (t - 1)) of the mean, which so reaches back over the same share of a short run and
    of a long one: the first step is taken whole, with share 1 all steps count alike. The statistics of batch norm are
    averaged as the weights are; buffers that have no mean follow those of the other network.
    """

    def __init__(self, into: nn.Module, of: nn.Module, share: float) -> None:
        self.share = share
        self.steps = 0
        self._networks = into, of
        averaged = [name for name, buffer in of.named_buffers() if has_mean(name, buffer)]
        self._weights = [[p for p in network.parameters() if p.is_floating_point()] for network in self._networks]
        self._places = [[place_of(network, name) for name in averaged] for network in self._networks]
        self._averaged = set(averaged)

    @torch.no_grad()
    def update(self) -> None:
        """Take in where the network is after one more step."""
        weight = 1.0 / (1.0 + self.share * self.steps)
        self.steps += 1
        # looked up anew, since a network may put a new tensor in the place of a buffer
        into, of = (
            [*weights, *(held[name] for held, name in places)]
            for weights, places in zip(self._weights, self._places, strict=True)
        )
        torch._foreach_lerp_(into, of, weight)

    @torch.no_grad()
    def follow(self) -> None:
        """Take over the buffers that have no mean."""
        into, of = self._networks
        for name, value in of.named_buffers():
            if name not in self._averaged:
                held, leaf = place_of(into, name)
                if held[leaf] is not None and held[leaf].shape == value.shape:
                    held[leaf].copy_(value)
                else:
                    held[leaf] = value.clone()


def has_mean(name: str, buffer: Tensor) -> bool:
    """Whether the mean of a buffer's values is one: not of counts, flags and masks of infinities.

    Nor of the unit vectors (`weight_u`, `_v`) by which spectral norm measures a weight: their mean is shorter.
    """
    numbers = buffer.is_floating_point() and buffer.numel() > 0 and bool(buffer.isfinite().all())
    return numbers and not name.endswith(("_u", "_v"))


def place_of(network: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Where a network holds the buffer of that name."""
    path, _, leaf = name.rpartition(".")
    return network.get_submodule(path)._buffers, leaf
