"""The engine: one distillation as a loop of rounds. It takes coefficients and returns statistics, by name."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ssdkd import selection
from ssdkd.averaging import Average
from ssdkd.buffer import RENDERED_AT_ONCE, ReplayBuffer, Samples, joined, random_views, render
from ssdkd.coefficients import Coefficients
from ssdkd.config import RunConfig
from ssdkd.costs import Costs, Work
from ssdkd.data import ImageSpec, LabelledImages
from ssdkd.devices import autocast_for, compiles, lay_out, layout_for, looked_at_once
from ssdkd.distiller import Distiller, Replayed, Shown, default_bound, divergence, make_optimizer
from ssdkd.errors import CheckpointError, ConfigError, NumericalError, in_one_line
from ssdkd.evaluation import accuracy, predictions
from ssdkd.inversion import (
    TERMS,
    ConvGenerator,
    Inverter,
    InverterSettings,
    Observer,
    PyramidInverter,
    Search,
    TextureInverter,
)
from ssdkd.inversion.generators import to_bytes
from ssdkd.inversion.textures import random_textures
from ssdkd.models import count_parameters, fingerprint, unwrapped
from ssdkd.muon import head_of
from ssdkd.stopwatch import Moment, Stopwatch
from ssdkd.trouble import Guard, all_finite, copied, learned, repaired, trouble_in

Statistics = dict[str, float]
QUANTILES = (0.1, 0.5, 0.9)
JUDGED = 128  # candidates that the student looks at in a round, for three quantiles
MEASURED = 4096  # values of which quantiles are taken
SMALLEST_FOR_PYRAMID = 16  # pixels; below, there are too few scales to gain from
SMALL_FOR_MUON = 1_000_000  # weights; in one of four million its step takes as long as the gradient's
TERMS_OF_GENERATOR = {"batch_norm": 10.0, "one_hot": 0.5, "adversarial": 1.0}
TERMS_OF_PYRAMID = {"batch_norm": 1.0, "one_hot": 1.0, "adversarial": 4.0}
TERMS_WITHOUT_BATCH_NORM = {"one_hot": 1.0, "adversarial": 1.0}


@dataclass(frozen=True)
class Recipe:
    """How many images of a round are inverted, left as random textures, and blended of others."""

    inverted: int
    textures: int
    blends: int

    @property
    def images(self) -> int:
        return self.inverted + self.textures + self.blends


class Engine:
    """Teacher, student, generator and buffer, and the four things that a round does with them."""

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        spec: ImageSpec,
        config: RunConfig,
        device: torch.device,
        evaluation: LabelledImages | None = None,
    ) -> None:
        """Both networks take (B, *spec channels and size) and return (B, classes); the teacher is frozen here."""
        self.config, self.spec, self.device, self.evaluation = config, spec, device, evaluation
        layout = layout_for(config.layout)
        # before they are on the device, which may have operations of its own: a budget means the same on all of them
        of_teacher, of_student = (Work.of(lay_out(network, layout), spec.shape) for network in (teacher, student))
        self.teacher = lay_out(teacher.to(device), layout).eval().requires_grad_(False)
        self.student = lay_out(student.to(device), layout)
        averaged = config.distillation.average > 0  # then `student`, which is handed out, is the mean of what learns
        self.learner = copy_of(self.student, "student") if averaged else self.student
        self.random = {
            name: torch.Generator(device).manual_seed(config.seed * 1000 + offset)
            for offset, name in enumerate(("inversion", "keep", "replay", "views", "textures", "blends"))
        }
        self.random["host"] = torch.Generator().manual_seed(config.seed * 1000 + 6)  # for what the host has to know
        self.mean, self.std = spec.normalisation(device)
        observer, inversion, keeping = Observer(self.teacher), config.inversion, config.buffer
        observer.look_for_batch_norm(spec.shape)
        self.starts_from = inversion.start
        if self.starts_from == "auto":
            large = min(spec.height, spec.width) >= SMALLEST_FOR_PYRAMID
            self.starts_from = ("pyramid" if large else "generator") if observer.has_batch_norm else "textures"
        self.inversion_steps = inversion.steps or (10 if self.starts_from == "pyramid" else 5)
        self.terms = _checked_terms(inversion.terms, self.starts_from, observer.has_batch_norm)
        practises = self.starts_from == "generator"  # whose first images are poor
        self.warmup = inversion.warmup or (20 if practises else 3)
        self.warmup_kept = _given(inversion.warmup_kept, 0.5 if practises else 1.0)
        self.blends = _given(inversion.blends, 1.0 if self.starts_from == "pyramid" else 0.0)
        self.texture_share = _given(inversion.textures, 0.5 if self.starts_from == "textures" else 0.0)
        self.shift = _given(keeping.shift, min(spec.height, spec.width) // 8)
        if self.shift >= min(spec.height, spec.width):
            raise ConfigError(
                f"buffer.shift: {self.shift} pixels move a {spec.height}x{spec.width} image out of sight; "
                f"give at most {min(spec.height, spec.width) - 1}."
            )
        generator = self._make_generator() if self.starts_from == "generator" else None
        of_generator = _generator_work(generator, inversion.latent) if generator is not None else Work()
        self.costs = Costs(of_teacher, of_student, of_generator)
        self.autocast = autocast_for(config.precision, device, self.costs.teacher.multiply_adds)
        self.inverter = self._make_inverter(observer, generator)
        self.stored_views = max(keeping.views, 1)
        rendered = keeping.rendered if keeping.views else False  # else new views are drawn for every step
        self.buffer = ReplayBuffer(
            keeping.capacity, spec.shape, spec.num_classes, self.stored_views, device, keeping.border, rendered
        )
        self.distiller = self._make_distiller()
        self.distiller.layout = self.inverter.layout = layout
        self.looked_at_once = looked_at_once(device, spec.height * spec.width)
        self.probe = torch.empty(0)  # (P, c, H, W) normalised inputs that are never trained on
        self.probe_logits = torch.empty(0)  # (P, C) the teacher's answer to them
        self.newest: Candidates  # what the warm-up made last
        self.round = 0
        self.spent = 0.0  # budget units: student training steps
        self.synthesized = 0
        self.seconds = 0.0  # of work, evaluation not counted
        self.stopwatch = Stopwatch(("warmup", "inversion", "replay", "rest", "evaluation"), device)
        self.statistics: Statistics = {}
        self.guard = Guard()

    def _make_generator(self) -> ConvGenerator:
        inversion, spec = self.config.inversion, self.spec
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.config.seed)
            generator = ConvGenerator(
                inversion.latent,
                spec.shape,
                spec.num_classes,
                inversion.width,
                inversion.conditional,
                inversion.subpixel,
                (self.mean, self.std) if inversion.output == "normalised" else None,
            )
        return generator.to(self.device, memory_format=torch.channels_last)  # type: ignore[no-any-return,call-overload]

    def _make_inverter(self, observer: Observer, generator: ConvGenerator | None) -> Search:
        inversion = self.config.inversion
        settings = InverterSettings(
            steps=self.inversion_steps,
            latent=inversion.latent,
            generator_rate=inversion.generator_rate,
            latent_rate=inversion.latent_rate,
            meta_rate=inversion.meta_rate,
            meta=inversion.meta,  # type: ignore[arg-type]
            memory=inversion.memory,
            pixel_rate=inversion.pixel_rate,
            terms=self.terms,
            shift=self.shift if inversion.augment else 0,
            flip=self.spec.flip and inversion.augment,
            border=self.config.buffer.border,
        )
        shared = (observer, self.mean, self.std, settings, self.random["inversion"])
        if generator is not None:
            return Inverter(generator, *shared, self.autocast)
        kind = {"textures": TextureInverter, "pyramid": PyramidInverter}[self.starts_from]
        return kind(self.spec.shape, *shared, self.random["host"], self.autocast)

    @property
    def optimizer_name(self) -> str:
        """The student's optimiser: the one configured, or what suits such a student and such a start."""
        name = self.config.distillation.optimizer
        small = count_parameters(self.learner) <= SMALL_FOR_MUON
        usual = "muon" if self.starts_from == "pyramid" and small else "sgd"
        return usual if name == "auto" else name

    def _make_distiller(self) -> Distiller:
        config, learning = self.config, self.config.distillation
        optimizer = make_optimizer(
            self.learner,
            self.optimizer_name,
            learning.learning_rate,
            learning.momentum,
            learning.weight_decay,
            learning.nesterov,
            head_of(self.learner, self.spec.shape) if self.optimizer_name == "muon" else None,
        )
        bound = _given(learning.clip, default_bound(self.learner))
        distiller = Distiller(self.learner, optimizer, self.mean, self.std, learning.temperature, bound, self.autocast)
        if self.learner is not self.student:
            distiller.average = Average(self.student, self.learner, learning.average)
        long_run = self.budget_rounds * learning.steps >= 30_000 or (config.minutes or 0.0) >= 10.0
        if compiles(config.compile, self.device, long_run):
            distiller.forward = torch.compile(self.learner, dynamic=False)
        return distiller

    # -- the budget -----------------------------------------------------------------------------------------

    def recipe(self, textures: float = 1.0, images: int | None = None) -> Recipe:
        """How many of `images`, by default those of a round, are made in which way; blends come on top.

        `textures` multiplies the odds of textures:

        share .25, odds 1 : 3   ->   times 3, odds 3 : 3, share .5
        """
        images = images or self.config.inversion.images
        share = textures * self.texture_share / (1.0 + (textures - 1.0) * self.texture_share)
        left_as_textures = round(share * images)
        return Recipe(images - left_as_textures, left_as_textures, round(self.blends * images))

    def batch_of(self, factor: float) -> int:
        """Images of a student step: about `factor` times as many as configured, and no more than the buffer holds.

        Only doubled or halved, as often as it takes, because every size of a batch is compiled anew.
        """
        configured = self.config.distillation.batch
        batch = round(configured * 2.0 ** round(math.log2(factor)))
        return max(min(batch, self.config.buffer.capacity), min(configured, 2))

    def round_cost(self, student_steps: int, recipe: Recipe | None = None, batch: int | None = None) -> float:
        """Budget units of one round with so many student steps, on `batch` images each; all else as a neutral one.

        The unit is a student step on as many images as configured.
        """
        made, costs = recipe or self.recipe(), self.costs
        batch = batch or self.config.distillation.batch
        making = costs.searching(made.inverted, self.inversion_steps) + costs.labelling(made.images, self.stored_views)
        step = costs.learning(batch)
        if self.config.buffer.views == 0:  # the teacher is asked anew
            step += costs.teacher.on(batch)
        return (making + student_steps * step) / costs.learning(self.config.distillation.batch)

    @property
    def budget_rounds(self) -> int:
        """The budget in rounds of effort 1; 0 where minutes are given, which count then."""
        return (self.config.rounds or 0) if self.config.minutes is None else 0

    @property
    def budget(self) -> float:
        """Budget units of the whole run; 0 where its budget is in minutes."""
        return self.budget_rounds * self.round_cost(self.config.distillation.steps)

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, in [0, 1]."""
        if self.config.minutes is not None:
            return min(self.seconds / (60.0 * self.config.minutes), 1.0)
        return min(self.spent / self.budget, 1.0)

    @property
    def finished(self) -> bool:
        """Whether what is left of the budget no longer pays for half a round."""
        if self.config.minutes is not None:
            return self.progress >= 1.0
        return self.budget - self.spent < 0.5 * self.round_cost(self.config.distillation.steps)

    def learning_rate_fraction(self, anneal: float) -> float:
        """The learning rate as a share of the largest one; it follows the budget, not the number of rounds.

        With `anneal` 1 it falls as the schedule says, with 0 not at all: the mean of the weights can do without.
        """
        if self.config.distillation.schedule == "constant":
            return 1.0
        scheduled = max(0.5 * (1.0 + math.cos(math.pi * self.progress)), 1e-3)
        return 1.0 - anneal * (1.0 - scheduled)

    # -- the loop -------------------------------------------------------------------------------------------

    def loop(self) -> Generator[Statistics, Coefficients, None]:
        """The whole method. Whoever drives it receives statistics and sends the coefficients of the next round."""
        statistics = self.statistics or self.warm_up()
        while not self.finished:
            coefficients = yield statistics  # decide: the policy's part
            candidates = self.invert(coefficients)
            kept = self.keep(candidates, coefficients)
            replayed = self.replay(coefficients)
            statistics = self.measure(candidates, kept, replayed)
            statistics = self.recover(statistics)
        yield statistics

    def warm_up(self) -> Statistics:
        """Teach the generator before the student's first step; put the probe aside and a first buffer together.

        Neutral coefficients and no adversarial term: what comes of it depends on the seed alone, so the probe
        is the same whatever the policy does later.
        """
        start = self.stopwatch.now()
        inversion, probe = self.config.inversion, self.config.probe
        uniform = torch.zeros(self.spec.num_classes, device=self.device)
        made: list[Candidates] = []
        probe_batches = -(-probe.images // inversion.images)
        to_keep = self.recipe(), self.inversion_steps
        to_probe = self.recipe(images=min(probe.images, inversion.images)), probe.patience * self.inversion_steps
        for step in range(self.warmup + probe_batches):
            recipe, search_steps = to_keep if step < self.warmup else to_probe
            targets = self._targets(uniform, 0.0, recipe.inverted)
            images, terms = self._make(recipe, targets, None, 0.0, search_steps)
            self.synthesized += len(images)
            if step >= int((1.0 - self.warmup_kept) * self.warmup):
                samples = self._label(images)
                made.append(Candidates(samples[samples.usable()], recipe, targets, terms))
        kept, for_probe = made[:-probe_batches], made[-probe_batches:]
        held_back = joined([each.samples for each in for_probe])[: probe.images]
        if len(held_back) == 0:
            raise NumericalError(
                "the teacher's answer is not finite for any of the first images: look at its weights, and at "
                "image.mean and image.std, which normalise what it sees."
            )
        for each in kept:
            self.buffer.append(each.samples, delta=1.0, round_index=0)
        self.probe = self.distiller.to_inputs(held_back.images.permute(0, 3, 1, 2))
        self.probe_logits = held_back.logits[:, 0]
        self._take_time("warmup", start)
        newest = kept[-1] if kept else for_probe[0]
        self.newest = newest if len(newest.samples) else replace(newest, samples=held_back)
        return self.begin()

    def begin(self) -> Statistics:
        """The first facts, of a new student. All that the warm-up made before them is independent of the student."""
        silence = torch.zeros((), device=self.device)
        statistics = self.measure(self._judged(self.newest), silence, Replayed(silence, silence))
        if self.finished:
            raise ConfigError(
                f"minutes: a budget of {self.config.minutes:g} leaves nothing to learn in, for the warm-up alone took "
                f"{self.seconds:.1f} s; give more."
            )
        self.guard.hold(self._parts(), statistics)
        return statistics

    def invert(self, coefficients: Coefficients) -> Candidates:
        """Make candidates for target classes that the buffer lacks, where the student errs."""
        start = self.stopwatch.now()
        counts = selection.class_counts(self.buffer.filled().classes, self.spec.num_classes)
        recipe = self.recipe(coefficients.textures)
        targets = self._targets(counts, coefficients.w_div, recipe.inverted)
        self.learner.eval()
        if isinstance(self.inverter, Inverter) and self.round + 1 == self.config.inversion.restart:
            self.inverter.restart()
        images, terms = self._make(recipe, targets, self.learner, coefficients.adversarial)
        candidates = self._judged(Candidates(self._label(images), recipe, targets, terms))
        self.synthesized += len(images)
        self.spent += self.round_cost(0, recipe)
        self._take_time("inversion", start)
        return candidates

    def keep(self, candidates: Candidates, coefficients: Coefficients) -> Tensor:
        """Let the best candidates into the buffer, by phi, wear and chance; free slots first, then by exchange.

        Returns how many went in, a scalar still on the device.
        """
        start = self.stopwatch.now()
        buffer, random = self.buffer, self.random["keep"]
        new, usable = candidates.samples, candidates.samples.usable()
        fresh = self.config.buffer.fresh
        if fresh or buffer.size < buffer.capacity:  # free slots take whatever comes; else nothing waits for the device
            rows = usable.nonzero()[:, 0]  # by the mask itself, each array would wait
            new, usable = new[rows], usable[rows]
            if fresh and len(rows):  # else what is there must do for another round
                buffer.size = 0
        held = buffer.filled()
        counts = selection.class_counts(torch.cat([held.classes, new.classes]), self.spec.num_classes)

        def score(samples: Samples) -> Tensor:
            log_phi = selection.log_modulation(
                samples.classes, samples.confidence, counts, coefficients.w_div, coefficients.gamma
            )
            return log_phi + selection.gumbel_noise(len(samples), random)

        slot_scores = score(held) + selection.log_worn(buffer.visits[: len(held)], coefficients.wear)
        new_scores = torch.where(usable, score(new), -torch.inf)  # which beats nothing
        order = new_scores.argsort(descending=True)
        free = buffer.capacity - buffer.size
        entered = buffer.append(new[order[:free]], delta=1.0, round_index=self.round) if free else 0
        rest = order[entered:]
        accepted = torch.zeros((), device=self.device)
        limit = round(coefficients.refresh * buffer.capacity)
        if len(rest) and limit and len(slot_scores):
            slots, winners, wins = selection.exchange(slot_scores, new_scores[rest], limit)
            buffer.replace(slots, new[rest[winners]], wins, self.round)
            accepted = wins.sum()
        self._take_time("rest", start)
        return accepted + entered

    def replay(self, coefficients: Coefficients) -> Replayed:
        """Train the student on prioritised batches of the buffer."""
        start = self.stopwatch.now()
        learning, buffer = self.config.distillation, self.buffer
        if buffer.size == 0:  # no image has been usable so far, which `recover` bears with for a few rounds
            silence = torch.zeros((), device=self.device)
            return Replayed(silence, silence, rate=0.0)
        batch = self.batch_of(coefficients.batch)
        steps = max(1, round(coefficients.effort * learning.steps * learning.batch / batch))
        making = self.round_cost(0)
        if self.config.minutes is None:  # the last round spends what is left, so that no effort overdraws the budget
            left = (self.budget - self.spent) / (self.round_cost(1, batch=batch) - making)
            steps = max(1, min(steps, round(left)))
        pi = self._priorities(coefficients)
        drawn = selection.draw(pi, steps * batch, self.random["replay"])
        weights = selection.importance_weights(pi, coefficients.beta, drawn)
        buffer.note_visits(drawn)
        rows = drawn.view(steps, batch)
        rate = self.learning_rate_fraction(coefficients.anneal)
        replayed = self.distiller.replay(
            buffer,
            rows,
            weights.view(steps, batch),
            learning.learning_rate * rate * self.guard.step["student"],
            self._shown(rows),
        )
        self.spent += self.round_cost(steps, batch=batch) - making
        self._take_time("replay", start)
        return replace(replayed, pi=pi, rate=rate)

    def replay_probabilities(self, coefficients: Coefficients) -> Tensor:
        """P over the buffer's samples under these coefficients: (N,)."""
        return selection.replay_probabilities(self._priorities(coefficients))

    def _priorities(self, coefficients: Coefficients) -> Tensor:
        """pi of the buffer's samples, the highest 1: (N,)."""
        held, log_phi = self.buffer.filled(), torch.zeros((), device=self.device)
        if coefficients.eta != 0:
            counts = selection.class_counts(held.classes, self.spec.num_classes)
            log_phi = selection.log_modulation(
                held.classes, held.confidence, counts, coefficients.w_div, coefficients.gamma
            )
        delta = self.buffer.delta[: self.buffer.size]
        return selection.priorities(selection.log_priority(delta, log_phi, coefficients.alpha, coefficients.eta))

    def measure(self, candidates: Candidates, kept: Tensor, replayed: Replayed) -> Statistics:
        """Everything worth knowing after a round, by name; the round's one transfer from the device."""
        start = self.stopwatch.now()
        tensors = self._facts(candidates, kept, replayed)
        values = torch.stack([t.float() for t in tensors.values()]).tolist()
        self.round += bool(self.statistics)
        self._take_time("rest", start)
        self.stopwatch.read()
        host = {
            "round": float(self.round),
            "progress": self.progress,
            "spent": self.spent,
            "seconds": self.seconds,
            "learning_rate": self.config.distillation.learning_rate * replayed.rate * self.guard.step["student"],
            "learning_rate_fraction": replayed.rate,
            "buffer_size": float(self.buffer.size),
            "buffer_fill": self.buffer.size / self.buffer.capacity,
            "synthesized": float(self.synthesized),
            "student_steps": float(replayed.steps),
            "student_batch": float(replayed.batch),
            "candidates": float(len(candidates.samples)),
            "inverted": float(candidates.recipe.inverted),
            "rollbacks": float(self.guard.rollbacks),
        }
        self.statistics = host | dict(zip(tensors, values, strict=True))
        return self.statistics

    def recover(self, statistics: Statistics) -> Statistics:
        """Hold a good round's state; after a bad one, take the part in trouble back to the last good one.

        Raises:
            NumericalError: that did not help; the networks are those of the last good round.
        """
        start = self.stopwatch.now()
        guard = self.guard
        found = trouble_in(statistics, guard.statistics, self.starts_from) or guard.strayed(statistics)
        if not found:
            guard.note_good_round()
            guard.hold(self._parts(), statistics)
            self._take_time("rest", start)
            return statistics
        parts = {trouble.part for trouble in found}
        worth_a_try = guard.note_trouble(parts)
        self._take_back(parts)
        if not worth_a_try:
            tried = guard.tries - 1
            raise NumericalError(
                f"{found[0].what} in round {self.round}, again after {tried} times back with half the step: "
                f"training diverged; {found[0].advice}"
            )
        self.statistics, judged_by = repaired(statistics, guard.statistics, parts)
        self.statistics["rollbacks"] = float(guard.rollbacks)
        guard.hold(self._parts(), judged_by)
        return self.statistics

    def _parts(self) -> dict[str, Any]:
        """The states of what can get into numerical trouble, not copied."""
        return {"student": self._students_state(), "generator": self.inverter.state_dict()}

    def _take_back(self, parts: set[str]) -> None:
        if "student" in parts:
            self._put_student(copied(self.guard.good["student"]))
            delta = self.buffer.delta
            largest = delta.nan_to_num(0.0, 0.0, 0.0).max()
            self.buffer.delta = torch.where(delta.isfinite(), delta, largest)
        if "generator" in parts:
            self.inverter.load_state_dict(copied(self.guard.good["generator"]))
        self.inverter.slow_down(self.guard.step["generator"])

    def _students_state(self) -> dict[str, Any]:
        """Where the student is, what it learns by, and what is handed out of it."""
        network, mean = unwrapped(self.learner), unwrapped(self.student)
        state = {"network": network.state_dict(), "optimizer": self.distiller.optimizer.state_dict()}
        if self.distiller.average is None:
            return state
        return {**state, "mean": mean.state_dict(), "mean_of": self.distiller.average.steps}

    def _learned(self) -> list[Any]:
        """What of that training changes."""
        mean = learned(self.student) if self.distiller.average is not None else {}
        return [learned(self.learner), self.distiller.optimizer.state_dict(), mean]

    def _put_student(self, state: dict[str, Any]) -> None:
        unwrapped(self.learner).load_state_dict(state["network"])
        self.distiller.optimizer.load_state_dict(state["optimizer"])
        if self.distiller.average is not None:
            unwrapped(self.student).load_state_dict(state["mean"])
            self.distiller.average.steps = int(state["mean_of"])

    # -- pieces of the phases -------------------------------------------------------------------------------

    def _targets(self, counts: Tensor, w_div: float, how_many: int) -> Tensor:
        prior, random = selection.class_prior(counts, w_div), self.random["inversion"]
        if self.config.inversion.targets == "drawn" and how_many:
            return torch.multinomial(prior, how_many, replacement=True, generator=random)
        return selection.draw(prior.double(), how_many, random)

    def _make(
        self,
        recipe: Recipe,
        targets: Tensor,
        student: nn.Module | None,
        adversarial: float,
        search_steps: int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Images inverted for `targets` (B,), with textures and blends beside them.

        Returns (M, H, W, c) uint8, and what the terms of the search came to; none where nothing was inverted.
        """
        made: list[Tensor] = []
        terms: dict[str, Tensor] = {}
        if recipe.inverted:
            images, terms = self.inverter.invert(targets, student, adversarial, search_steps)
            made.append(images)
        if recipe.textures:
            generators = self.random["textures"], self.random["host"]
            made.append(to_bytes(random_textures(recipe.textures, self.spec.shape, self.mean, self.std, *generators)))
        if recipe.blends:
            made.append(self._blended(torch.cat(made), recipe.blends))
        return torch.cat(made), terms

    def _blended(self, images: Tensor, count: int) -> Tensor:
        """Mixtures of new images with others of the buffer, or of each other while it is empty: -> (count, H, W, c).

        They cost one look of the teacher where an inverted image costs some thirty.
        """
        random = self.random["blends"]
        others = self.buffer.images[: self.buffer.size] if self.buffer.size else images

        def shown(of: Tensor) -> Tensor:
            rows = torch.randint(len(of), (count,), generator=random, device=self.device)
            views = random_views(count, 2, self.shift, self.spec.flip, random)[:, 1]
            return render(of, rows, views, self.config.buffer.border).float()

        share = 0.25 + 0.5 * torch.rand((count, 1, 1, 1), generator=random, device=self.device)
        return to_bytes(torch.lerp(shown(images), shown(others), share) / 255.0)

    @torch.no_grad()
    def _label(self, images: Tensor) -> Samples:
        """Ask the teacher once for each stored view: (M, H, W, c) uint8."""
        views = random_views(len(images), self.stored_views, self.shift, self.spec.flip, self.random["views"])
        flat_rows = torch.arange(len(images), device=self.device).repeat_interleave(self.stored_views)
        logits = self._teacher_logits(images, flat_rows, views.view(-1, 3))
        logits = logits.view(len(images), self.stored_views, -1)
        confidence, classes = torch.softmax(logits[:, 0], dim=1).max(dim=1)
        return Samples(images, views, logits, classes, confidence)

    def _teacher_logits(self, images: Tensor, rows: Tensor, views: Tensor) -> Tensor:
        border = self.config.buffer.border
        return torch.cat(
            [
                self._answers(self.teacher, self.distiller.to_inputs(render(images, r, v, border)))
                for r, v in zip(rows.split(RENDERED_AT_ONCE), views.split(RENDERED_AT_ONCE), strict=True)
            ]
        )

    def _answers(self, network: nn.Module, inputs: Tensor) -> Tensor:
        """What a network says, in batches of the size that is looked at fastest: (B, c, H, W) -> (B, C)."""
        with self.autocast:
            return torch.cat([network(part).float() for part in inputs.split(self.looked_at_once)])

    @torch.no_grad()
    def teacher_wavers(self) -> bool:
        """Whether the teacher answers otherwise to images of the probe when they are shown alone."""
        among, alone = self.probe[:8], self.probe[:2].split(1)
        answers = self._answers(self.teacher, among)
        apart = torch.cat([self._answers(self.teacher, image) for image in alone]) - answers[:2]
        return bool(apart.abs().max() > 0.1 * answers.std(correction=0))  # bfloat16 stays far below

    @torch.no_grad()
    def _judged(self, candidates: Candidates) -> Candidates:
        """Add what the student has to learn from them; some of them stand for all."""
        self.learner.eval()
        samples = candidates.samples
        inputs = self.distiller.to_inputs(evenly(samples.images, JUDGED).permute(0, 3, 1, 2))
        said, learned = evenly(samples.logits[:, 0], JUDGED), self._answers(self.learner, inputs)
        return replace(candidates, delta=divergence(said, learned, self.config.distillation.temperature))

    def _shown(self, rows: Tensor) -> Iterator[Shown]:
        """What the student sees of each batch of `rows` (K, B), and what the teacher says of it."""
        buffer, random = self.buffer, self.random["replay"]
        if self.config.buffer.views:
            return self.distiller.show_stored(buffer, rows, random)
        ask = functools.partial(self._answers, self.teacher)
        return self.distiller.show_anew(buffer, rows, ask, self.shift, self.spec.flip, random)

    @torch.no_grad()
    def _facts(self, candidates: Candidates, kept: Tensor, replayed: Replayed) -> dict[str, Tensor]:
        held, n = self.buffer.filled(), self.buffer.size
        share = selection.class_counts(held.classes, self.spec.num_classes) / max(n, 1)
        entropy = -(share * torch.log(share.clamp(min=1e-12))).sum() / math.log(self.spec.num_classes)
        self.student.eval()
        answers = self._answers(self.student, self.probe)
        probe_kl = divergence(self.probe_logits, answers, 1.0).mean()
        agreement = (answers.argmax(dim=1) == self.probe_logits.argmax(dim=1)).float().mean()
        facts = {
            "class_entropy": entropy,
            "class_share_min": share.min(),
            "class_share_max": share.max(),
            "probe_kl": probe_kl,
            "probe_agreement": agreement,
            "replay_loss": replayed.loss,
            "replay_agreement": replayed.agreement,
            "accepted": kept,
            "replay_ess": torch.ones((), device=self.device),
            "replay_top_decile": torch.full((), 0.1, device=self.device),
        }
        if replayed.pi is not None:
            facts["replay_ess"] = selection.effective_share(replayed.pi)
            facts["replay_top_decile"] = selection.top_decile_share(evenly(replayed.pi, MEASURED))
        new, usable = candidates.samples, candidates.samples.usable()
        inverted = slice(0, max(candidates.recipe.inverted, 1))
        classes_made = torch.zeros_like(share).scatter_add_(0, new.classes[inverted], usable[inverted].float())
        facts |= {
            "candidates_broken": len(new) - usable.sum(),
            "candidate_classes": (classes_made > 0).sum(),
            "candidate_pixel_spread": spread(new.images[inverted]),
            "target_share_max": self._largest_share(candidates.targets),
            "student_finite": all_finite(self._learned(), self.device),
            "generator_finite": all_finite(self.inverter.state_dict(), self.device),
        }
        for name, values in {
            "confidence": held.confidence,
            "delta": self.buffer.delta[:n],
            "age": (self.round - self.buffer.entered[:n]).float(),
            "visits": self.buffer.visits[:n].float(),
            "candidate_confidence": torch.where(usable, new.confidence, 0.0),
            "candidate_delta": torch.where(evenly(usable, JUDGED), candidates.delta, 0.0),
        }.items():
            for quantile, value in zip(QUANTILES, quantiles(values), strict=True):
                facts[f"{name}_q{round(100 * quantile)}"] = value
        return facts | {f"term_{name}": value for name, value in candidates.terms.items()}

    def _largest_share(self, targets: Tensor) -> Tensor:
        """Share of the class that is among them most often."""
        if len(targets) == 0:
            return torch.ones((), device=self.device)
        return selection.class_counts(targets, self.spec.num_classes).max() / len(targets)

    def _take_time(self, phase: str, start: Moment) -> None:
        self.seconds += self.stopwatch.stop(phase, start)

    @property
    def phase_seconds(self) -> dict[str, float]:
        """What of the seconds, and of those of evaluation, went where."""
        return self.stopwatch.seconds

    # -- what is reported -----------------------------------------------------------------------------------

    @property
    def chosen(self) -> dict[str, Any]:
        """What the run has for the settings that may be left open, named and nested as in YAML."""
        return {
            "precision": "bfloat16" if isinstance(self.autocast, torch.autocast) else "float32",
            "compile": "off" if self.distiller.forward is self.learner else "on",
            "inversion": {
                "start": self.starts_from,
                "steps": self.inversion_steps,
                "textures": self.texture_share,
                "blends": self.blends,
                "warmup": self.warmup,
                "warmup_kept": self.warmup_kept,
                "terms": dict(self.terms),
            },
            "buffer": {"shift": self.shift, "rendered": self.buffer.rendered is not None},
            "distillation": {"optimizer": self.optimizer_name, "clip": self.distiller.clip},
        }

    def accuracy(self, model: nn.Module) -> float | None:
        """Percent right on the evaluation set, if there is one."""
        if self.evaluation is None:
            return None
        start = self.stopwatch.now()
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):  # of which it may draw
            named = predictions(model, self.evaluation.images, self.mean, self.std, self.autocast)
        value = accuracy(named, self.evaluation.labels)
        self.stopwatch.stop("evaluation", start)
        self.stopwatch.read()
        return value

    # -- everything that determines the future --------------------------------------------------------------

    @functools.cached_property
    def teacher_fingerprint(self) -> str:
        """Which teacher it is that a run has; its weights are no part of the state."""
        return fingerprint(learned(unwrapped(self.teacher)))

    def state_dict(self) -> dict[str, Any]:
        self.stopwatch.read()
        return {
            "teacher": self.teacher_fingerprint,
            "student": self._students_state(),
            "inverter": self.inverter.state_dict(),
            "buffer": self.buffer.state_dict(),
            "probe": self.probe,
            "probe_logits": self.probe_logits,
            "random": {name: generator.get_state() for name, generator in self.random.items()},
            "global_random": torch.get_rng_state(),
            "device_random": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "round": self.round,
            "spent": self.spent,
            "synthesized": self.synthesized,
            "seconds": self.seconds,
            "phase_seconds": dict(self.phase_seconds),
            "statistics": dict(self.statistics),
            "guard": self.guard.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            CheckpointError: by another teacher, whose answers the buffer does not hold.
        """
        if state.get("teacher", self.teacher_fingerprint) != self.teacher_fingerprint:  # older states lack it
            raise CheckpointError(
                "the teacher has other weights than the one that the run began with: go on with that one "
                "(--teacher.checkpoint FILE where it lies elsewhere now), or start a new run."
            )
        self._put_student(state["student"])
        self.load_made(state)
        for name, generator in self.random.items():
            generator.set_state(state["random"][name])
        torch.set_rng_state(state["global_random"])
        if self.device.type == "cuda" and state.get("device_random") is not None:
            torch.cuda.set_rng_state(state["device_random"], self.device)
        self.round, self.spent = state["round"], state["spent"]
        self.statistics = dict(state["statistics"])
        self.guard.load_state_dict(state["guard"])
        self.guard.hold(self._parts(), self.guard.statistics)
        self.inverter.slow_down(self.guard.step["generator"])

    def load_made(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` tells of images made and the time it took, which is all that a warm-up leaves."""
        self.inverter.load_state_dict(state["inverter"])
        self.buffer.load_state_dict(state["buffer"])
        self.probe = state["probe"].to(self.device)
        self.probe_logits = state["probe_logits"].to(self.device)
        self.synthesized, self.seconds = state["synthesized"], state["seconds"]
        self.phase_seconds.update(state["phase_seconds"])


@dataclass(frozen=True)
class Candidates:
    """Fresh samples (M of them), how they were made, and what the student has to learn from an even part of them."""

    samples: Samples
    recipe: Recipe
    targets: Tensor  # classes (recipe.inverted,) that were searched for
    terms: dict[str, Tensor]  # of the search, each a scalar
    delta: Tensor = field(default_factory=lambda: torch.empty(0))  # (at most JUDGED,)


def quantiles(values: Tensor) -> Tensor:
    """The 10, 50 and 90 % quantiles (3,) of (N,); of an even part of it where it is large."""
    if len(values) == 0:
        return torch.zeros(len(QUANTILES), device=values.device)
    return torch.quantile(evenly(values, MEASURED).float(), _levels(values.device))


@functools.cache
def _levels(device: torch.device) -> Tensor:
    """Sent to the device once, since sending waits for it."""
    return torch.tensor(QUANTILES, device=device)


def evenly(values: Tensor, most: int) -> Tensor:
    """At most so many of the rows of `values`, evenly spaced: (N, ...) -> (n, ...)."""
    return values[:: max(1, -(-len(values) // most))]


def spread(images: Tensor) -> Tensor:
    """Standard deviation of a pixel over the images, averaged over pixels: (N, H, W, c) uint8 -> scalar."""
    pixels = images.float()
    return (pixels - pixels.mean(dim=0)).square_().mean(dim=0).sqrt_().mean()


def _given(value: float | None, usual: float) -> Any:
    """A setting that may be left open."""
    return usual if value is None else value


def _checked_terms(given: dict[str, float] | None, starts_from: str, has_batch_norm: bool) -> dict[str, float]:
    """Weights of the search's loss terms: those given, or what suits such a teacher and such a start."""
    usual = TERMS_OF_GENERATOR if starts_from == "generator" else TERMS_OF_PYRAMID
    if not has_batch_norm:
        usual = TERMS_WITHOUT_BATCH_NORM
    terms = dict(usual if given is None else given)
    unknown = sorted(set(terms) - set(TERMS))
    if unknown:
        raise ConfigError(f"inversion.terms: no term is called {unknown[0]!r}; there are {', '.join(TERMS)}.")
    wrong = [name for name, weight in terms.items() if not 0 <= weight < math.inf]  # none helps the other way round
    if wrong:
        raise ConfigError(f"inversion.terms.{wrong[0]}: expected a number of at least 0, got {terms[wrong[0]]}.")
    return terms


def copy_of(network: nn.Module, role: str) -> nn.Module:
    """A second network of the same weights."""
    try:
        with torch.no_grad():  # else parts in TorchScript go on with what is computed from the weights of the first
            second = copy.deepcopy(network)
        for weight, original in zip(second.parameters(), network.parameters(), strict=True):
            if weight.requires_grad != original.requires_grad:
                weight.requires_grad_(original.requires_grad)
            keep_hooks(weight, original)
        return second
    except Exception as error:  # it may be anyone's code
        advice = ", as the mean of its weights needs: set distillation.average to 0" if role == "student" else ""
        if role == "teacher" and "graph leaves" in str(error):  # as the old weight_norm leaves in it, or a hook
            advice = ": call it on an image under torch.no_grad() first, so that what it holds was computed there"
        raise ConfigError(f"the {role} cannot be copied ({in_one_line(error)}){advice}.") from error


def keep_hooks(weight: nn.Parameter, original: nn.Parameter) -> None:
    """Have what was registered on a weight's gradient, as a mask of what is pruned, on its copy, too."""
    if weight.requires_grad:
        for hook in (original._backward_hooks or {}).values():
            weight.register_hook(hook)
        for hook in (original._post_accumulate_grad_hooks or {}).values():
            weight.register_post_accumulate_grad_hook(hook)


def _generator_work(generator: nn.Module, latent: int) -> Work:
    """What making images costs."""

    class OfLatents(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = copy.deepcopy(generator).cpu().eval()

        def forward(self, latents: Tensor) -> Tensor:
            flat = latents.flatten(1)
            result: Tensor = self.generator(flat, torch.zeros(len(flat), dtype=torch.int64))
            return result

    return Work.of(OfLatents(), (latent, 1, 1))
