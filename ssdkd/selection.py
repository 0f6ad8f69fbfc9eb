"""What is kept and what is replayed: the modulating function, the priority function, and drawing by them.

Pure functions on tensors. N samples in the buffer, M candidates, C classes; nothing here waits for the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6
BLOCK = 32  # samples that a draw sums at once where there are many


def class_counts(classes: Tensor, num_classes: int) -> Tensor:
    """How many samples of each class: (N,) int64 -> (C,) float."""
    ones = torch.ones(classes.shape, device=classes.device)
    return torch.zeros(num_classes, device=classes.device).scatter_add_(0, classes, ones)


def log_modulation(classes: Tensor, confidence: Tensor, counts: Tensor, w_div: float, gamma: float) -> Tensor:
    """log phi = -w_div log(n_c / mean n) + gamma log(1 - p + eps): classes, confidence (N,), counts (C,) -> (N,)."""
    crowding = torch.log(counts.clamp(min=1.0) / counts.mean().clamp(min=EPSILON))
    difficulty = torch.log((1.0 - confidence).clamp(min=0.0) + EPSILON)
    return gamma * difficulty - w_div * crowding[classes]


def log_worn(visits: Tensor, wear: float) -> Tensor:
    """-wear log(1 + visits), added to log phi where it is decided what stays: (N,) int64 -> (N,)."""
    return -wear * torch.log1p(visits.float())


def class_prior(counts: Tensor, w_div: float) -> Tensor:
    """Probability of each class as the next inversion's target, in proportion to (n_c + 1)^-w_div: (C,) -> (C,)."""
    return torch.softmax(-w_div * torch.log(counts + 1.0), dim=0)


def log_priority(delta: Tensor, log_phi: Tensor, alpha: float, eta: float) -> Tensor:
    """log pi = alpha log(delta + eps) + eta log phi: (N,), (N,) -> (N,)."""
    return delta.clamp(min=0.0).add_(EPSILON).log_().mul_(alpha).add_(eta * log_phi)  # one array, also of a million


def priorities(log_pi: Tensor) -> Tensor:
    """pi(i) / max_j pi(j), all that drawing and weighing need, without a pass to make them sum to 1: (N,) -> (N,)."""
    return (log_pi - log_pi.max()).exp_()


def replay_probabilities(pi: Tensor) -> Tensor:
    """P(i) = pi(i) / sum pi, in double precision: (N,) -> (N,)."""
    return pi.double() / pi.sum(dtype=torch.float64)


def effective_share(pi: Tensor) -> Tensor:
    """1 / (N sum P(i)^2), the share of the samples that equal draws would come from: (N,) -> scalar in (0, 1]."""
    return pi.sum().square() / pi.square().sum() / len(pi)


def top_decile_share(pi: Tensor) -> Tensor:
    """Share of the draws that the tenth with the highest P takes: (N,) -> scalar in [0.1, 1]."""
    return torch.topk(pi, max(1, len(pi) // 10)).values.sum() / pi.sum()


def importance_weights(pi: Tensor, beta: float, rows: Tensor | None = None) -> Tensor:
    """w_i = (N P(i))^-beta / max_j w_j, which lies in (0, 1], of `rows` (M,) or of all: (N,) -> (M,) or (N,) float.

    N and the sum in P cancel: w_i = (pi(i) / min_j pi(j))^-beta.
    """
    chosen = pi if rows is None else pi[rows]
    ratio = torch.log(chosen.clamp(min=1e-30)) - torch.log(pi.min().clamp(min=1e-30))
    return torch.exp(-beta * ratio).float().clamp(min=1e-12)


def draw(pi: Tensor, how_many: int, generator: torch.Generator) -> Tensor:
    """Draw with replacement in proportion to pi, stratified: (N,) -> (how_many,) int64 in random order.

    One draw falls into each of `how_many` equal slices of the cumulative distribution, so that every sample
    comes up within one of its expected number of times; equal pi give whole epochs, not coin tosses.

    Many more samples than draws are summed in blocks first, and only in the blocks drawn one by one. Sums of sums run
    in double precision, so that small shares of large buffers survive:

        pi       .2 .1 .3 .2 | .1 .1 .4 .0 | .3 .2 .2 .1
        blocks            .8           1.4           2.2     <- the point 1.1 lies in the second block, .3 into it
        inside                 .1 .2 .6 .6                   <- and there in the third sample
    """
    device = pi.device
    block = BLOCK if len(pi) >= BLOCK * how_many else 1
    short = -len(pi) % block
    blocks = (F.pad(pi, (0, short)) if short else pi).view(-1, block)
    sums = blocks.sum(dim=1).double()
    cumulative = sums.cumsum(0)
    offset = torch.rand(1, generator=generator, device=device, dtype=torch.float64)
    points = (torch.arange(how_many, device=device) + offset) / how_many * cumulative[-1]
    drawn = torch.searchsorted(cumulative, points, right=True).clamp_(max=len(blocks) - 1)
    inside = blocks[drawn].double().cumsum(1)
    left = points - (cumulative - sums)[drawn]
    left = torch.minimum(left, inside[:, -1] * (1.0 - 1e-12))  # rounding must not carry it past the block's end
    place = torch.searchsorted(inside, left[:, None], right=True)[:, 0]
    indices = (drawn * block + place).clamp_(max=len(pi) - 1)
    return indices[torch.randperm(how_many, generator=generator, device=device)]


def gumbel_noise(how_many: int, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise (how_many,): the top k of log phi + noise sample k without replacement by phi."""
    uniform = torch.rand(how_many, generator=generator, device=generator.device)
    return -torch.log(-torch.log(uniform.clamp(min=1e-20, max=1.0 - 1e-7)))


def exchange(slot_scores: Tensor, candidate_scores: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which slots give way to which candidates so that the highest scores stay, at most `limit` of them.

    The j-th best candidate meets the j-th worst slot and wins if its score is higher; for limit >= M the
    outcome is exactly the top N of both together.

        slots, ascending        0.1  0.4  0.7  0.9 ...
        candidates, descending  2.0  0.8  0.3
        accepted                yes  yes  no

    (N,), (M,) -> slots (K,), winners (K,), accepted (K,) bool, with K = min(limit, M, N).
    """
    pairs = min(limit, len(candidate_scores), len(slot_scores))
    worst, slots = torch.topk(slot_scores, pairs, largest=False)
    best, winners = torch.topk(candidate_scores, pairs)
    return slots, winners, best > worst
