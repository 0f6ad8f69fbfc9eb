"""What a round costs, counted so that a budget means the same on every machine.

Multiply-adds alone would not do: in networks for small images most of the time goes into starting their operations,
and a policy could take many small steps for next to nothing. So an operation costs as much as `STARTED` multiply-adds
before it has done any.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ssdkd.models import count_work

STARTED = 1_000_000  # with which two thirds of 40 tasks are counted within a factor of 1.17 (docs/results.md)


@dataclass(frozen=True)
class Work:
    """A forward pass of a network: multiply-adds for each image and operations for each batch."""

    multiply_adds: int = 0
    operations: int = 0

    @classmethod
    def of(cls, model: nn.Module, input_shape: tuple[int, int, int]) -> Work:
        return cls(*count_work(model, input_shape))

    def on(self, images: int, batches: int = 1) -> float:
        """What so many images cost in so many batches."""
        return float(self.multiply_adds * images + STARTED * self.operations * batches) if images else 0.0


@dataclass(frozen=True)
class Costs:
    """What each kind of work costs: a backward pass as two forward ones, or as one for the input's gradient alone."""

    teacher: Work
    student: Work
    generator: Work

    def searching(self, images: int, steps: int) -> float:
        """Inverting so many images at once, the student consulted."""
        once = 3.0 * self.generator.on(images) + 2.0 * self.teacher.on(images) + 2.0 * self.student.on(images)
        return steps * once

    def labelling(self, images: int, views: int) -> float:
        """The teacher's answers to the views of so many images, and the student's to one of them."""
        return self.teacher.on(images * views, batches=views) + self.student.on(images)

    def starting(self, batch: int) -> float:
        """Share of such a training step that goes into starting its operations, in [0, 1]."""
        whole = self.student.on(batch)
        return 1.0 - self.student.multiply_adds * batch / whole if whole else 0.0

    def learning(self, batch: int) -> float:
        """One training step of the student, the unit of the budget: above 0 for whatever a student is."""
        return max(3.0 * self.student.on(batch), 1.0)
