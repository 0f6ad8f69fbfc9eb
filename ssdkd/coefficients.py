"""The coefficients that steer a run: the one table of their names, ranges and meanings.

The action space, the TensorBoard layout, the documentation's tables and the fixed policies all read it here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Range:
    """What one coefficient may be, what it is when it steers nothing, and what it steers."""

    name: str
    low: float
    high: float
    neutral: float
    formula: tuple[float, float]  # what `ssdkd` sets, at the start and at the end of a run (docs/method.md)
    logarithmic: bool  # equal action steps multiply it, rather than add to it
    steers: str

    def from_unit(self, unit: float) -> float:
        """Map an action entry in [-1, 1] into [low, high]; what lies outside is clipped, NaN means neutral."""
        if math.isnan(unit):
            return self.neutral
        share = (min(max(unit, -1.0), 1.0) + 1.0) / 2.0
        if self.logarithmic:
            return self.low * (self.high / self.low) ** share
        return self.low + (self.high - self.low) * share

    def to_unit(self, value: float) -> float:
        """The action entry in [-1, 1] that stands for `value`."""
        if self.logarithmic:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(max(2.0 * share - 1.0, -1.0), 1.0)


def _coefficient(
    low: float,
    high: float,
    neutral: float,
    formula: float | tuple[float, float],
    steers: str,
    logarithmic: bool = False,
) -> Any:
    start_end = formula if isinstance(formula, tuple) else (formula, formula)
    meta = {"low": low, "high": high, "neutral": neutral, "formula": start_end}
    return field(default=neutral, metadata={**meta, "logarithmic": logarithmic, "steers": steers})


@dataclass(frozen=True)
class Coefficients:
    """One decision: the coefficients of the modulating function, the priority function and the inversion."""

    #                             low   high  neutral  ssdkd
    w_div: float = _coefficient(0.00, 2.0, 0.0, 1.72, "class balance of what is kept and of what is made next")
    gamma: float = _coefficient(-2.0, 4.0, 0.0, 0.0, "difficulty of what is kept: above 0 hard, below 0 easy")
    refresh: float = _coefficient(0.02, 0.5, 0.1, 0.47, "how much of the buffer may change in a round", True)
    wear: float = _coefficient(0.00, 2.0, 0.0, 0.0, "how readily what was replayed often gives way to what is new")
    alpha: float = _coefficient(0.00, 1.5, 0.0, 0.40, "how strongly replay follows disagreement")
    beta: float = _coefficient(0.00, 1.0, 0.0, 0.0, "how fully weights undo the bias of replay")
    eta: float = _coefficient(0.00, 1.0, 0.0, 0.45, "how much the modulating function also steers replay")
    adversarial: float = _coefficient(0.0, 2.0, 1.0, 1.0, "how hard inversion looks for the student's errors")
    effort: float = _coefficient(0.25, 4.0, 1.0, 1.0, "how much is replayed in a round, against making samples", True)
    batch: float = _coefficient(0.25, 4.0, 1.0, 1.0, "images of a student step, of the same replays in a round", True)
    anneal: float = _coefficient(0.0, 1.0, 1.0, 1.0, "how far the learning rate follows its schedule down")
    textures: float = _coefficient(0.1, 10.0, 1.0, 1.0, "odds of random textures against inverted images", True)

    @classmethod
    def from_unit(cls, action: Sequence[float]) -> Coefficients:
        """Read an action, one entry in [-1, 1] per coefficient, in the order of the table."""
        return cls(**{r.name: r.from_unit(float(unit)) for r, unit in zip(RANGES, action, strict=True)})

    def to_unit(self) -> list[float]:
        """The action in [-1, 1] that stands for these coefficients."""
        return [r.to_unit(getattr(self, r.name)) for r in RANGES]

    def as_dict(self) -> dict[str, float]:
        return {r.name: getattr(self, r.name) for r in RANGES}


RANGES: tuple[Range, ...] = tuple(Range(entry.name, **entry.metadata) for entry in fields(Coefficients))
