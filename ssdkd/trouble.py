"""Numerical trouble: seen in a round's own facts, undone by going back to the round before with a smaller step.

Three things go wrong without anybody's fault: the student's loss or weights leave the finite numbers, the
generator's do, or the generator collapses (every candidate the same image, or the same class where many were
asked for). The part in trouble goes back to where the last good round left it and goes on with half its step,
at most `MOST_TRIES` times before `HEALED_AFTER` good rounds have gone by; then the run ends with a sentence.

What is gone back to is the state after the last good round, which is also what a checkpoint of that round holds:
a run that is resumed there has the same to go back to.

A fourth thing no single round shows: a student that stays finite and unlearns, step by step or at once. If for
`PATIENCE` rounds in a row both its divergence on the probe and its loss are more than `FAR_ABOVE` times what they
were when it was best, the student goes back to where it was best. Both, because each alone may rise for good
reasons: the loss when the policy replays harder images, the divergence while a high learning rate still swings.
(Over 26 runs on digits, MNIST and CIFAR-10, random coefficients among them, both were that far for two rounds at most.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MOST_TRIES = 3
HEALED_AFTER = 100  # good rounds after which the tries count anew; steps stay as small as they have become
FEWEST_FOR_COLLAPSE = 16  # inverted images: fewer may all be of one class by chance
MOSTLY_ONE_TARGET = 0.75  # share of one target class from which on candidates of one class are no collapse
FAR_ABOVE = 3.0  # times the best from which on a student is astray ...
AT_LEAST_ABOVE = 0.5  # ... and so many nats above it on the probe: three times almost nothing is almost nothing
PATIENCE = 20  # rounds in a row
SAME_IMAGE = 0.5  # mean deviation of a pixel between images, of 255, below which they are one image
LOWER_RATE = "lower distillation.learning_rate or set distillation.clip"


@dataclass(frozen=True)
class Trouble:
    """What is wrong with which part of the method."""

    part: str  # student or generator
    what: str  # as part of a sentence
    advice: str


def trouble_in(now: Mapping[str, float], before: Mapping[str, float], start: str = "generator") -> list[Trouble]:
    """What is wrong in the statistics of a round, judged by those of the last good round (empty at the start).

    `start` is what the search starts from, as in `inversion.start`.
    """
    found: list[Trouble] = []
    broken, candidates = now["candidates_broken"], now["candidates"]
    aside = f"; the teacher's answer is not finite for {broken:.0f} of {candidates:.0f} candidates" if broken else ""
    for name in ("replay_loss", "probe_kl"):
        if not math.isfinite(now[name]):
            found.append(Trouble("student", f"{name} is {now[name]}", LOWER_RATE))
    if not now["student_finite"]:
        found.append(Trouble("student", "the student's weights are not finite", LOWER_RATE))

    searched, lower_rates = "search", "lower inversion.pixel_rate"
    if start == "generator":
        searched, lower_rates = "generator", "lower inversion.generator_rate and inversion.meta_rate"
    if not math.isfinite(now.get("term_loss", 0.0)):
        found.append(Trouble("generator", f"the inversion loss is {now['term_loss']}{aside}", lower_rates))
    if not now["generator_finite"]:
        found.append(Trouble("generator", f"the generator's weights are not finite{aside}", lower_rates))
    if candidates and broken == candidates:
        found.append(Trouble("generator", f"no candidate was usable{aside}", "look at the teacher and its input range"))
    elif now["inverted"] >= FEWEST_FOR_COLLAPSE:
        spread, classes = now["candidate_pixel_spread"], now["candidate_classes"]
        if spread < SAME_IMAGE <= before.get("candidate_pixel_spread", 0.0):
            found.append(
                Trouble("generator", f"the {searched} collapsed: every candidate is the same image", lower_rates)
            )
        elif classes == 1 < before.get("candidate_classes", 0.0) and now["target_share_max"] < MOSTLY_ONE_TARGET:
            advice = f"give inversion.terms.balance a weight or {lower_rates}"
            found.append(Trouble("generator", f"the {searched} collapsed: every candidate is of one class", advice))
    return found


STUDENTS_FACTS = ("probe_kl", "probe_agreement", "replay_loss", "replay_agreement")
GENERATORS_FACTS = ("candidate_pixel_spread", "candidate_classes")


def repaired(
    now: Mapping[str, float], good: Mapping[str, float], parts: set[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """The statistics after `parts` went back: as they are reported, and as the next round is judged by."""
    back = STUDENTS_FACTS if "student" in parts else ()
    reported = {
        name: good.get(name, 0.0) if name in back or not math.isfinite(value) else value for name, value in now.items()
    }
    return reported, reported | {name: good[name] for name in GENERATORS_FACTS if name in good}


COUNTS = ("rollbacks", "tries", "good_rounds", "astray")


class Guard:
    """The last good state of the parts that can get into trouble, and how often they did."""

    def __init__(self) -> None:
        self.rollbacks = 0
        self.tries = 0
        self.good_rounds = 0  # since the last trouble
        self.step = {"student": 1.0, "generator": 1.0}  # share of the step as configured
        self.good: dict[str, Any] = {}  # each part's state after the last good round
        self.statistics: dict[str, float] = {}  # of that round
        self.best: dict[str, Any] = {}  # the student where it was nearest to the teacher on the probe, and its facts
        self.astray = 0  # rounds in a row in which it was far from there

    def hold(self, parts: Mapping[str, Any], statistics: Mapping[str, float]) -> None:
        """Remember the states of `parts` by name, as they are after a good round."""
        self.good.clear()  # first, so that no state is held twice
        self.good = {name: copied(state) for name, state in parts.items()}
        self.statistics = dict(statistics)
        facts = {name: statistics[name] for name in STUDENTS_FACTS}
        has_learned = facts["replay_loss"] > 0.0
        if has_learned and (not self.best or facts["probe_kl"] < self.best["facts"]["probe_kl"]):
            self.best = {"student": self.good["student"], "facts": facts}

    def strayed(self, now: Mapping[str, float]) -> list[Trouble]:
        """What no single round shows: the student is far from its best for long. That becomes the last good state."""
        if not self.best:
            return []
        facts = self.best["facts"]
        far = all(now[name] > FAR_ABOVE * facts[name] for name in ("probe_kl", "replay_loss"))
        self.astray = self.astray + 1 if far and now["probe_kl"] > facts["probe_kl"] + AT_LEAST_ABOVE else 0
        if self.astray < PATIENCE:
            return []
        self.astray = 0
        self.good["student"] = self.best["student"]
        self.statistics |= facts
        what = f"for {PATIENCE} rounds probe_kl has been above {FAR_ABOVE:g} times its best, {facts['probe_kl']:.3g},"
        return [Trouble("student", f"{what} and the loss with it", LOWER_RATE)]

    def note_good_round(self) -> None:
        self.good_rounds += 1
        if self.good_rounds >= HEALED_AFTER:
            self.tries = 0

    def note_trouble(self, parts: set[str]) -> bool:
        """Halve the steps of `parts`: -> whether there is a try left."""
        self.tries += 1
        self.rollbacks += 1
        self.good_rounds = 0
        for part in parts:
            self.step[part] *= 0.5
        return self.tries <= MOST_TRIES

    def state_dict(self) -> dict[str, Any]:
        """Without the good state, which is that of the run as a whole."""
        counts = {name: getattr(self, name) for name in COUNTS}
        return {**counts, "step": dict(self.step), "statistics": dict(self.statistics), "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in COUNTS:
            setattr(self, name, int(state[name]))
        self.step, self.statistics = dict(state["step"]), dict(state["statistics"])
        self.best = dict(state["best"])


def copied(state: Any) -> Any:
    """A tree of dicts, lists and tuples with its tensors copied, on their own device."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(copied(value) for value in state)
    return state


def learned(network: nn.Module) -> dict[str, Tensor]:
    """What training changes of a network, by name: parameters, and the statistics of its normalisations.

    Other buffers may hold infinities, such as masks.
    """
    buffers = network.named_buffers()
    statistics = {name: b for name, b in buffers if name.rpartition(".")[2] in ("running_mean", "running_var")}
    return {**dict(network.named_parameters()), **statistics}


def all_finite(state: Any, device: torch.device) -> Tensor:
    """Whether every floating-point tensor in a tree of state is finite; a scalar on the device, 1.0 or 0.0."""
    numbers = [t for t in _tensors_in(state) if t.is_floating_point() and t.numel()]
    on_device = [t for t in numbers if t.device.type == device.type]  # an optimiser's step counts stay on the CPU
    if not on_device:
        return torch.ones((), device=device)
    norms = torch._foreach_norm(on_device)
    return torch.stack([norm.float() for norm in norms]).isfinite().all().float()


def _tensors_in(state: Any) -> Iterator[Tensor]:
    """The tensors in a tree of dicts, lists and tuples."""
    if isinstance(state, Tensor):
        yield state.detach()
    elif isinstance(state, (dict, list, tuple)):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _tensors_in(value)
