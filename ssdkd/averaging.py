"""The mean of a student's weights over its last steps: what is measured and handed out while the student learns on.

A student that takes large steps swings around the place it is drawn to; the mean of where it has been is nearer to
that place than any one of its steps, at any moment of a run. So the learning rate need not fall for it, and the steps
that a falling rate would have made small still teach.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Average:
    """Keeps one network at the running mean of another, over about the last `share` of all steps so far.

    Step t counts for 1 / (1 + share (t - 1)) of the mean, which so reaches back over the same share of a short run and
    of a long one: the first step is taken whole, with share 1 all steps count alike. The statistics of batch norm are
    averaged as the weights are.
    """

    def __init__(self, into: nn.Module, of: nn.Module, share: float) -> None:
        self.share = share
        self.steps = 0
        self._into, self._of = _numbers(into), _numbers(of)

    @torch.no_grad()
    def update(self) -> None:
        """Take in where the network is after one more step."""
        weight = 1.0 / (1.0 + self.share * self.steps)
        self.steps += 1
        torch._foreach_lerp_(self._into, self._of, weight)


def _numbers(network: nn.Module) -> list[Tensor]:
    """What of a network can be averaged: its floating-point parameters and buffers, but for masks of infinities."""
    buffers = [b for b in network.buffers() if b.isfinite().all()]  # the mean of two infinities would be NaN
    return [t for t in (*network.parameters(), *buffers) if t.is_floating_point()]
