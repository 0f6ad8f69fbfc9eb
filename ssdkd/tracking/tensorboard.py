"""What the policy did, round by round, for TensorBoard. The plan of the tags is in `ssdkd.tracking.tags`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch

from ssdkd import selection
from ssdkd.coefficients import RANGES, Coefficients
from ssdkd.config import RunConfig
from ssdkd.engine import Engine
from ssdkd.files import atomic_write_bytes
from ssdkd.report import write_report
from ssdkd.tracking.charts import Chart, to_pixels
from ssdkd.tracking.events import EventWriter, Point, lines, margin, to_png
from ssdkd.tracking.folder import REPLAYS, REPORT, RunFolder
from ssdkd.tracking.pictures import replay_grid
from ssdkd.tracking.tags import FINAL, MEASURED_NOW_AND_THEN, SPREADS, TAGS, Moment, description, scalars, tables
from ssdkd.tracking.whatif import what_if

PICTURES_EVERY = 50  # rounds, unless that would take more than this share of the work:
MOST_SHARE = 0.005
PREFACE = "Custom Scalars lays the curves out as they are meant to be read. What each tag means:\n\n"
FOREMOST = ("dataset", "policy", "rounds", "seed", "student.name")
NOT_SETTINGS = ("tracking.", "checkpoint.", "out", "data_root", "threads", "device")


class Tracker:
    """Writes a run's event file; call `update` after every round and `finish` at the end.

    Made after the engine was restored, where a run is resumed. Whatever goes wrong here is said once, ends the
    tracking, and leaves the run alone.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        folder: RunFolder,
        warn: Callable[[str], None],
        policy: Any = None,
    ) -> None:
        """A policy may have `diagnostics(observation)`: named numbers that tell what it makes of an observation."""
        self.settings = config.tracking
        self.config, self.engine, self.folder, self.warn = config, engine, folder, warn
        self.diagnose: Callable[[np.ndarray], Mapping[str, float]] | None = getattr(policy, "diagnostics", None)
        descriptions = {tag.name: description(tag) for tag in TAGS if "{" not in tag.name}
        self.writer = EventWriter(folder.path, warn, descriptions, after=engine.round)
        if not self.settings.tensorboard:
            self.writer.active = False
        self.seconds = 0.0  # spent in here
        self._before = dict(engine.statistics)
        self._last = self._clock()
        self._last_learned = self._learned = 0.0
        self._begun = False

    def update(self, line: Mapping[str, float], observation: np.ndarray) -> None:
        """Note a round: its line of metrics.jsonl, and the observation that came of it."""
        if not self.writer.active:
            return
        start = time.perf_counter()
        before, self._before = self._before, dict(line)
        self._learned += line["student_steps"] * line["student_batch"]
        step, every = self.engine.round, self.settings.every
        is_due = step % every == 0 or step == 1 or self.engine.finished
        try:
            if is_due:
                self._write(line, before or line, observation, step)
            else:
                moment = self._moment(line, before or line)
                now = scalars(moment, lambda tag: tag.name in MEASURED_NOW_AND_THEN)
                self.writer.add(Point(now), step)  # nothing, in most rounds
        except Exception as error:  # what watches a run must not be able to end it
            self.writer.give_up(f"{type(error).__name__}: {error}")
        self.seconds += time.perf_counter() - start

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Note what the run came to, close the file, and write the report."""
        if self.writer.active:
            self._end(summary)
        if self.settings.report:
            try:
                if self.settings.images:
                    grid = replay_grid(self.engine.buffer, self.engine.spec.num_classes, tile=52)
                    atomic_write_bytes(self.folder / REPLAYS, to_png(grid))
                write_report([self.folder.path], self.folder / REPORT)
            except Exception as error:  # see update
                self.warn(f"{REPORT} was not written ({type(error).__name__}: {error}).")

    def _end(self, summary: Mapping[str, Any]) -> None:
        try:
            totals = {k: v for k, v in summary.items() if isinstance(v, (int, float))}
            moment = self._moment(self._before, self._before, totals=totals)
            step = self.engine.round + 1  # past the last round: a run that ends anew after a resume writes it again
            self.writer.add(Point(scalars(moment, lambda tag: tag.name.startswith(FINAL))), step)
            self.writer.end_session(step)
        except Exception as error:  # see update
            self.writer.give_up(f"{type(error).__name__}: {error}")
        self.writer.close()

    def close(self) -> None:
        self.writer.close()

    def _write(
        self, line: Mapping[str, float], before: Mapping[str, float], observation: np.ndarray, step: int
    ) -> None:
        if not self._begun and not self.writer.continues:
            self.writer.add_text("plan", PREFACE + tables(), step)
            self.writer.add_hparams(settings_of(self.config), _metrics_of_a_sweep(), step, FOREMOST)
            self.writer.add_layout(layout(self.engine), step)
        told = self.diagnose(observation) if self.diagnose is not None else {}
        moment = self._moment(line, before, since=self._since_last(), memory=_memory(self.engine.device), policy=told)
        values = scalars(moment, lambda tag: not tag.name.startswith(FINAL))
        if step == 1 or self.engine.finished or self._pictures_are_due(step):
            shown = pictures(self.engine, line) if self.settings.images else {}
            self.writer.add(Point(values, histograms(self.engine, line), shown), step)
        else:
            self.writer.add(Point(values), step)
        self._begun = True

    def _pictures_are_due(self, step: int) -> bool:
        interval = self.settings.pictures_every
        if interval == 0 and self.seconds > MOST_SHARE * self.engine.seconds:
            return False
        interval = interval or PICTURES_EVERY
        return step >= interval and step % interval < self.settings.every

    def _moment(self, line: Mapping[str, float], before: Mapping[str, float], **more: Any) -> Moment:
        cost = self.engine.round_cost(self.config.distillation.steps)
        return Moment(line, before, cost, self.engine.buffer.capacity, **more)

    def _clock(self) -> dict[str, float]:
        phases = {f"phase_{name}": s for name, s in self.engine.phase_seconds.items() if name != "warmup"}
        return {
            **phases,
            "phase_tracking": self.seconds,
            "seconds": self.engine.seconds,
            "rounds": float(self.engine.round),
            "made": float(self.engine.synthesized),
        }

    def _since_last(self) -> dict[str, float]:
        now = self._clock()
        gone = {key: value - self._last.get(key, 0.0) for key, value in now.items()}
        gone["learned"] = self._learned - self._last_learned
        self._last, self._last_learned = now, self._learned
        return gone


@torch.no_grad()
def histograms(engine: Engine, coefficients: Mapping[str, float]) -> dict[str, np.ndarray]:
    """What the histograms show of the buffer, each (N,); `coefficients` may hold more than these."""
    held, buffer = engine.buffer.filled(), engine.buffer
    delta = buffer.delta[: buffer.size]
    chosen = Coefficients(**{r.name: coefficients[r.name] for r in RANGES})
    counts = selection.class_counts(held.classes, engine.spec.num_classes)
    log_phi = selection.log_modulation(held.classes, held.confidence, counts, chosen.w_div, chosen.gamma)
    kept = torch.softmax(log_phi + selection.log_worn(buffer.visits[: buffer.size], chosen.wear), dim=0) * len(held)
    replayed = engine.replay_probabilities(chosen) * len(held)
    return {
        "buffer/confidence": held.confidence.cpu().numpy(),
        "buffer/kl_log10_nats": torch.log10(delta + selection.EPSILON).cpu().numpy(),
        "buffer/keep_probability_times_mean": kept.cpu().numpy(),
        "buffer/replay_probability_times_mean": replayed.cpu().numpy(),
    }


def pictures(engine: Engine, line: Mapping[str, float]) -> dict[str, np.ndarray]:
    """The images held, their classes, and the what-if panels: each (H, W, 3) uint8."""
    panels = what_if(line, line)
    return {
        "buffer/images": replay_grid(engine.buffer, engine.spec.num_classes, per_class=7, blocks=2),
        "buffer/classes": to_pixels([class_chart(engine)], columns=1, width=400, height=200),
        "selection/what_if_kept": to_pixels(panels[0:3], columns=3, width=270, height=210),
        "selection/what_if_replayed_by_kl": to_pixels(panels[3:5], columns=2, width=270, height=210),
        "selection/what_if_replayed_by_phi": to_pixels(panels[5:7], columns=2, width=270, height=210),
    }


def class_chart(engine: Engine) -> Chart:
    """How many images of each class the buffer holds."""
    counts = selection.class_counts(engine.buffer.filled().classes, engine.spec.num_classes)
    return Chart("Images of each class", "class", bars=counts.tolist(), whole_x=True)


def layout(engine: Engine) -> dict[str, list[Any]]:
    """The Custom Scalars page: coefficients with their references, bands, and what belongs together."""
    policy = [
        lines(r.name, [f"policy/{r.name}", f"reference/{r.name}_neutral", f"reference/{r.name}_ssdkd"]) for r in RANGES
    ]
    bands = [
        margin(f"{meaning}: median, 10 to 90 %", f"spread/{name}_q10", f"buffer/{name}_median", f"spread/{name}_q90")
        for _, name, _, meaning in SPREADS
    ]
    student = ["student/probe_agreement_percent", "student/replay_agreement_percent", "student/accuracy_percent"]
    terms = [f"inversion/{name}" for name, weight in engine.terms.items() if weight]
    phases = [f"time/{name}_percent" for name in ("inversion", "replay", "evaluation", "tracking", "rest")]
    return {
        "policy: the coefficients, with neutral and ssdkd": policy,
        "buffer: what is in it": [
            *bands,
            lines("class shares (%)", ["buffer/class_share_min_percent", "buffer/class_share_max_percent"]),
        ],
        "selection": [
            lines(
                "how sharply replay selects (%)",
                ["selection/effective_sample_size_percent", "selection/replay_share_of_top_decile_percent"],
            )
        ],
        "inversion: loss terms": [lines("terms before their weights", terms)],
        "student": [lines("agreement and accuracy (%)", student)],
        "time": [lines("share of each phase (%)", phases)],
    }


def settings_of(config: Any, prefix: str = "") -> dict[str, Any]:
    """What a sweep may vary, flat; what cannot change the outcome, and paths, are left out."""
    found: dict[str, Any] = {}
    for entry in fields(config):
        name, value = prefix + entry.name, getattr(config, entry.name)
        if name.startswith(NOT_SETTINGS):
            continue
        if is_dataclass(value):
            found |= settings_of(value, f"{name}.")
        elif isinstance(value, dict):
            found |= {f"{name}.{key}": v for key, v in value.items()}
        elif value is not None and name != "teacher.checkpoint":
            found[name] = value
    return found


def _metrics_of_a_sweep() -> dict[str, str]:
    return {tag.name: tag.name.removeprefix(FINAL) for tag in TAGS if tag.name.startswith(FINAL)}


def _memory(device: torch.device) -> dict[str, float]:
    """MiB in use by this process, and at most so far on the GPU."""
    used = {}
    if device.type == "cuda":
        used["gpu"] = torch.cuda.max_memory_allocated(device) / 2**20
    try:
        with open("/proc/self/statm", encoding="ascii") as status:
            used["host"] = int(status.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (OSError, ValueError):
        pass  # only Linux tells it this way
    return used
