"""The terms of the inversion loss: each one small function from what is seen of a batch to a number to minimise.

A new term is one function here with `@register_term`; its weight then goes into `inversion.terms` of a config.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Scene:
    """One batch of candidates as the teacher and the student see it: B images, C classes."""

    images: Tensor  # (B, c, H, W) pixels in [0, 1]
    inputs: Tensor  # (B, c, H, W) the same, normalised as the teacher wants them
    targets: Tensor  # (B,) the class each image should show
    teacher_logits: Tensor  # (B, C)
    student_logits: Tensor | None  # (B, C), None while the student is not consulted
    batch: list[tuple[Tensor, Tensor]]  # per batch-norm layer: mean and variance of this batch
    remembered: list[tuple[Tensor, Tensor]] | None  # the same, averaged over earlier batches
    running: list[tuple[Tensor, Tensor]]  # the same, as the teacher learned them
    features: Tensor | None  # (B, F) what the teacher's last layer reads
    memory: float  # share of the remembered statistics in the batch-norm distance


Reads = Literal["", "student", "statistics", "features"]


@dataclass(frozen=True)
class Term:
    """A loss term and the costly part of the scene that it reads, which is made only when a term needs it."""

    compute: Callable[[Scene], Tensor]
    reads: Reads


TERMS: dict[str, Term] = {}


def register_term(name: str, reads: Reads = "") -> Callable[[Callable[[Scene], Tensor]], Callable[[Scene], Tensor]]:
    """Make a term known under the name that configs use."""

    def register(compute: Callable[[Scene], Tensor]) -> Callable[[Scene], Tensor]:
        TERMS[name] = Term(compute, reads)
        return compute

    return register


@register_term("one_hot")
def one_hot(scene: Scene) -> Tensor:
    """Cross-entropy of the teacher to the target class."""
    return F.cross_entropy(scene.teacher_logits, scene.targets)


@register_term("one_hot_argmax")
def one_hot_argmax(scene: Scene) -> Tensor:
    """Cross-entropy of the teacher to whatever it believes most (methods without targets)."""
    return F.cross_entropy(scene.teacher_logits, scene.teacher_logits.detach().argmax(dim=1))


@register_term("batch_norm", reads="statistics")
def batch_norm(scene: Scene) -> Tensor:
    """Distance of the batch's statistics to those the teacher learned, summed over its batch-norm layers."""
    if not scene.batch:  # layers that a teacher has, and does not use in evaluation
        return scene.images.new_zeros(())
    seen, learned = ([each for pair in of for each in reversed(pair)] for of in (scene.batch, scene.running))
    if scene.remembered is not None:
        past = [each for pair in scene.remembered for each in reversed(pair)]
        seen = list(torch._foreach_lerp(seen, past, scene.memory))
    return cast(Tensor, _Distance.apply(learned, *seen))


class _Distance(torch.autograd.Function):
    """Sum of the distances of vectors that are seen to those that were learned, in pairs.

    As one list, forward and backward: on a GPU each operation on a vector this short takes as long as a convolution to
    start, and one by one they were half of all that an inversion step starts.
    """

    @staticmethod
    def forward(ctx: Any, learned: list[Tensor], *seen: Tensor) -> Tensor:
        apart = torch._foreach_sub(learned, list(seen))
        norms = torch._foreach_norm(apart)
        ctx.save_for_backward(*apart, *norms)
        return functools.reduce(torch.add, norms)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        apart, norms = saved[: len(saved) // 2], torch.stack(saved[len(saved) // 2 :])
        directions = torch._foreach_div(apart, norms.masked_fill(norms == 0.0, torch.inf).unbind())
        return None, *torch._foreach_mul(directions, -slope)


def _student(scene: Scene) -> Tensor:
    if scene.student_logits is None:
        raise ValueError("an adversarial term was asked for without the student's logits")
    return scene.student_logits


@register_term("adversarial", reads="student")
def adversarial(scene: Scene) -> Tensor:
    """Minus KL(T, S), only where both agree on the class, so that the search stays on the teacher's ground."""
    student = _student(scene)
    teacher = scene.teacher_logits
    agree = (teacher.argmax(dim=1) == student.argmax(dim=1)).float()
    divergence = F.kl_div(
        F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1), reduction="none", log_target=True
    )
    return -(divergence.sum(dim=1) * agree).mean()


@register_term("adversarial_js", reads="student")
def adversarial_js(scene: Scene) -> Tensor:
    """Minus the Jensen-Shannon divergence of teacher and student at temperature 3, at most 1."""
    temperature = 3.0
    p = torch.softmax(scene.teacher_logits / temperature, dim=1)
    q = torch.softmax(_student(scene) / temperature, dim=1)
    middle = torch.log(((p + q) / 2).clamp(min=1e-8))
    divergence = F.kl_div(middle, p, reduction="batchmean") + F.kl_div(middle, q, reduction="batchmean")
    return -(divergence / 2).clamp(max=1.0)


@register_term("adversarial_l1", reads="student")
def adversarial_l1(scene: Scene) -> Tensor:
    """Minus the mean absolute difference of the logits."""
    return -(scene.teacher_logits - _student(scene)).abs().mean()


@register_term("balance")
def balance(scene: Scene) -> Tensor:
    """Minus the entropy of the mean prediction: lowest when every class is predicted equally often."""
    mean = torch.softmax(scene.teacher_logits, dim=1).mean(dim=0)
    return (mean * torch.log(mean.clamp(min=1e-8))).sum()


@register_term("activation", reads="features")
def activation(scene: Scene) -> Tensor:
    """Minus the mean size of the penultimate features: real images excite a network more than noise does."""
    if scene.features is None:
        return scene.images.new_zeros(())
    return -scene.features.abs().mean()


@register_term("total_variation")
def total_variation(scene: Scene) -> Tensor:
    """Mean squared difference between neighbouring pixels."""
    x = scene.images
    return (x[:, :, 1:] - x[:, :, :-1]).square().mean() + (x[..., 1:] - x[..., :-1]).square().mean()


@register_term("l2")
def l2(scene: Scene) -> Tensor:
    """Mean squared pixel value, measured from mid-grey."""
    return (scene.images - 0.5).square().mean()


@register_term("pixels")
def pixels(scene: Scene) -> Tensor:
    """Distance of the batch's pixel statistics to what the teacher's normalisation says of its data.

    A teacher is fed images whose channels have mean 0 and variance 1 after normalisation; so its mean and
    standard deviation are the statistics of a batch-norm layer in front of all others, which every teacher has.
    """
    variance, mean = torch.var_mean(scene.inputs, dim=(0, 2, 3), correction=0)
    return torch.linalg.vector_norm(mean) + torch.linalg.vector_norm(variance - 1.0)
