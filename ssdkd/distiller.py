"""Training the student on the buffer: K steps on prioritised batches, nothing waiting for the host."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssdkd.averaging import Average
from ssdkd.buffer import ReplayBuffer, random_views, render
from ssdkd.devices import is_of_compiling, laid_out
from ssdkd.errors import ConfigError, in_one_line
from ssdkd.muon import Muon

NORMALISING = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.GroupNorm, nn.LayerNorm, nn.RMSNorm),
)


def divergence(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> Tensor:
    """KL(T || S) of the softened outputs, times temperature squared: (B, C), (B, C) -> (B,)."""
    return divergence_and_slope(teacher_logits, student_logits, temperature)[0]


def divergence_and_slope(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """That divergence (B,), and its derivative by the student's logits (B, C)."""
    # classes first: a CPU then works on many images at once, where a row of ten classes would be too short
    target = F.log_softmax(teacher_logits.t() / temperature, dim=0)
    learned = F.log_softmax(student_logits.t() / temperature, dim=0)
    chances = target.exp()
    delta = (chances * (target - learned)).sum(dim=0) * temperature**2
    return delta, ((learned.exp() - chances) * temperature).t()


def make_optimizer(
    student: nn.Module,
    name: str,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool = True,
    head: nn.Module | None = None,
) -> torch.optim.Optimizer:
    """The student's optimiser: sgd, muon, adam or adamw; those of PyTorch as one pass over the weights.

    `head` is the layer that muon takes for the last.
    """
    named = {name: p for name, p in student.named_parameters() if p.requires_grad}
    for weight, values in named.items():
        if values.is_complex():
            raise ConfigError(
                f"the student's {weight} is of complex numbers, which no optimiser here takes: keep it as pairs of "
                "floats and let its forward join them (torch.view_as_complex)."
            )
    parameters = list(named.values())
    if name == "muon":
        return Muon(student, learning_rate, momentum, weight_decay, nesterov, head)
    if name == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=learning_rate,
            momentum=momentum,
            weight_decay=weight_decay,
            nesterov=nesterov and momentum > 0,
            fused=True,
        )
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    return kind(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)


def default_bound(student: nn.Module) -> float:
    """2 for a network in which no layer normalises, which a step too long can bring to a standstill; else 0, none."""
    return 0.0 if any(isinstance(layer, NORMALISING) for layer in student.modules()) else 2.0


def excess(weights: list[nn.Parameter], largest: float) -> Tensor:
    """How many times `largest` the norm of their gradients is; 1 where it is less: scalar on their device."""
    norms = torch._foreach_norm([weight.grad for weight in weights if weight.grad is not None])
    return (torch.linalg.vector_norm(torch.stack(norms)) / largest).clamp_(min=1.0).float()  # whatever the weights are


@dataclass
class Replayed:
    """What a round of replay was like."""

    loss: Tensor  # mean weighted loss; a scalar still on the device, as the next
    agreement: Tensor  # share of replayed images on which student and teacher name the same class
    steps: int = 0
    batch: int = 0  # images of each
    rate: float = 1.0  # the learning rate as a share of the largest one
    pi: Tensor | None = None  # (N,) by which was drawn


Shown = tuple[Tensor, Tensor]  # inputs (B, c, H, W) and the teacher's logits for them (B, C)


class Distiller:
    """A student, its optimiser, and the step that teaches it."""

    def __init__(
        self,
        student: nn.Module,
        optimizer: torch.optim.Optimizer,
        mean: Tensor,
        std: Tensor,
        temperature: float,
        clip: float,
        autocast: AbstractContextManager[Any],
    ) -> None:
        """`mean` and `std` (1, c, 1, 1) normalise pixels in [0, 1]; `clip` bounds the gradient's norm (0: not)."""
        self.student = student
        self._weights = [p for p in student.parameters() if p.requires_grad]
        # parts that were put into evaluation mode within a student that trains, as frozen batch norm is, stay in it
        self._resting = [layer for layer in student.modules() if not layer.training] if student.training else []
        self.optimizer = optimizer
        self._scale, self._shift = 1.0 / (255.0 * std), -mean / std
        self.temperature = temperature
        self.clip = clip
        self.autocast = autocast
        self.layout = torch.channels_last  # in which the inputs lie
        self.forward: Any = student  # what runs the student in training; a compiled form may take its place
        self.average: Average | None = None  # of the student's weights

    def to_inputs(self, images: Tensor) -> Tensor:
        """Normalise what `render` shows: (B, c, H, W) uint8 -> float."""
        # as large as an image, not one number a channel: a CPU then works on many pixels at once
        if self._scale.shape[1:] != images.shape[1:]:
            one_image = images.shape[1:]
            self._scale, self._shift = (
                laid_out(of[..., :1, :1].expand(1, *one_image), torch.channels_last)
                for of in (self._scale, self._shift)
            )
        inputs = images.to(torch.float32, copy=True)  # which is then worked on in place
        return laid_out(torch.addcmul(self._shift, inputs, self._scale, out=inputs), self.layout)

    def show_stored(self, buffer: ReplayBuffer, rows: Tensor, random: torch.Generator) -> Iterator[Shown]:
        """For each batch of `rows` (K, B): one of the stored views of each, with the teacher's stored answers."""
        stored = buffer.views.shape[1]
        views = torch.randint(0, stored, rows.shape, generator=random, device=rows.device)
        for batch, view in zip(rows, views, strict=True):
            inputs = self.to_inputs(buffer.show(batch, view))
            yield inputs, buffer.logits[batch, view]

    def show_anew(
        self,
        buffer: ReplayBuffer,
        rows: Tensor,
        ask: Callable[[Tensor], Tensor],
        max_shift: int,
        flip: bool,
        random: torch.Generator,
    ) -> Iterator[Shown]:
        """For each batch of `rows` (K, B): a new random view of each; `ask` says what the teacher answers."""
        for batch in rows:
            views = random_views(len(batch), 2, max_shift, flip, random)[:, 1]
            inputs = self.to_inputs(render(buffer.images, batch, views, buffer.border))
            with torch.no_grad():
                answers = ask(inputs)
            yield inputs, answers

    def replay(
        self,
        buffer: ReplayBuffer,
        rows: Tensor,
        weights: Tensor,
        learning_rate: float,
        shown: Iterable[Shown],
    ) -> Replayed:
        """Train one step on each of K batches: what is `shown` of `rows` (K, B), weighted by `weights` (K, B)."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.student.train()
        for layer in self._resting:
            layer.training = False
        deltas, agreed = [], []
        for batch, weight, (inputs, teacher_logits) in zip(rows, weights, shown, strict=True):
            delta, agree = self._step(inputs, teacher_logits, weight)
            buffer.note_replay(batch, delta)
            deltas.append(delta)
            agreed.append(agree)
        if self.average is not None:
            self.average.follow()
        loss = (weights * torch.stack(deltas)).mean()
        return Replayed(loss, torch.stack(agreed).float().mean(), *rows.shape)

    def _step(self, inputs: Tensor, teacher_logits: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Learn from one batch: -> how wrong the student was, and whether it named the teacher's class, each (B,)."""
        try:
            said, delta = self._differentiate(inputs, teacher_logits, weights)
        except Exception as error:
            if self.forward is self.student or not is_of_compiling(error):
                raise
            warnings.warn(f"the student learns without being compiled ({in_one_line(error)})", stacklevel=2)
            self.forward = self.student
            said, delta = self._differentiate(inputs, teacher_logits, weights)
        if self.clip > 0:
            # a fused optimiser divides by it on its way, as it undoes the scale of torch.amp
            self.optimizer.grad_scale = excess(self._weights, self.clip)  # type: ignore[attr-defined]
        self.optimizer.step()
        if self.average is not None:
            self.average.update()
        return delta, said.argmax(dim=1) == teacher_logits.argmax(dim=1)

    def _differentiate(self, inputs: Tensor, teacher_logits: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the mean weighted loss: -> the student's logits (B, C), and how wrong it was (B,)."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast:
            student_logits = self.forward(inputs)
        said = student_logits.detach().float()
        delta, slope = divergence_and_slope(teacher_logits, said, self.temperature)
        # written down rather than recorded, which takes as long as a layer
        student_logits.backward((slope * (weights[:, None] / len(weights))).to(student_logits.dtype))
        return said, delta
