"""What TensorBoard shows of a policy's training: the table of tags, and the writer."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.logger import KVWriter

from agents.evaluate import FIXED
from ssdkd.coefficients import RANGES
from ssdkd.tracking.events import EventWriter, Point, lines, margin
from ssdkd.tracking.tags import Tag, description, tables
from ssdkd.tracking.tensorboard import PREFACE, settings_of

MEASURES: dict[str, tuple[str, str, str]] = {  # of `agents.evaluate.summary` -> name, unit, meaning
    "accuracy_area": ("accuracy_area_percent", "%", "mean accuracy over the budget"),
    "accuracy": ("accuracy_percent", "%", "accuracy in the end"),
    "probe_area": ("probe_area_nats", "nats", "how far log KL on the probe lay below its start, mean over the budget"),
    "agreement": ("agreement_percent", "%", "probe images named alike in the end"),
}
GROUPS: dict[str, str] = {
    "episodes": "what an episode brought, while the policy explores",
    "coefficients": "what it tried",
    "evaluation": "whole episodes on held-out tasks, without exploring, beside the fixed policies",
    "train": "what the algorithm says of itself",
    "speed": "how fast it goes",
}
ENDED = "episodes that ended since the last point"
TRIED = "coefficients in force since the last point, exploration included"
JUDGED = "`evaluation.jsonl`: interquartile mean over tasks and seeds"
TAGS: tuple[Tag, ...] = (
    Tag("episodes/return", "scalar", "as `reward` says", "sum of an episode's rewards, mean", ENDED),
    Tag("episodes/return_spread", "scalar", "as `reward` says", "its standard deviation between episodes", ENDED),
    Tag("episodes/rounds", "scalar", "rounds", "length of an episode, mean", ENDED),
    Tag("episodes/ended", "scalar", "episodes", "how many that were", ENDED),
    Tag("coefficients/{coefficient}", "histogram", "", "all values that were tried", TRIED),
    Tag("coefficients/{coefficient}_mean", "scalar", "", "their mean", TRIED),
    Tag("coefficients/{coefficient}_spread", "scalar", "", "their standard deviation", TRIED),
    Tag("coefficients/{coefficient}_q10", "scalar", "", "their 10 % quantile", TRIED),
    Tag("coefficients/{coefficient}_q90", "scalar", "", "their 90 % quantile", TRIED),
    *(
        Tag(f"evaluation/{name}_{{policy}}", "scalar", unit, f"{meaning}, for learned, uniform, random, ssdkd", JUDGED)
        for name, unit, meaning in MEASURES.values()
    ),
    Tag(
        "train/{quantity}", "scalar", "", "losses, entropy, clipping and the like, of the last update", "the algorithm"
    ),
    Tag("speed/rounds_per_second", "scalar", "rounds/s", "over all environments, since the start", "the clock"),
)


def of_episodes(ended: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Values of `episodes/` from what Stable-Baselines3's Monitor says of each: r, its return, and l, its length."""
    returns = np.array([episode["r"] for episode in ended])
    return {
        "episodes/return": float(returns.mean()),
        "episodes/return_spread": float(returns.std()),
        "episodes/rounds": float(np.mean([episode["l"] for episode in ended])),
        "episodes/ended": float(len(ended)),
    }


def of_coefficients(chosen: np.ndarray) -> dict[str, float]:
    """Values of `coefficients/` from those that were tried, (rounds, coefficients) in the order of the table."""
    found: dict[str, float] = {}
    for r, values in zip(RANGES, chosen.T, strict=True):
        low, high = np.quantile(values, [0.1, 0.9])
        about = {"mean": values.mean(), "spread": values.std(), "q10": low, "q90": high}
        found |= {f"coefficients/{r.name}_{name}": float(value) for name, value in about.items()}
    return found


def of_evaluation(judged: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Values of `evaluation/` from policy -> measure -> value."""
    return {
        f"evaluation/{MEASURES[measure][0]}_{policy}": value
        for policy, measures in judged.items()
        for measure, value in measures.items()
    }


def layout(has_evaluation: bool) -> dict[str, list[Any]]:
    """The Custom Scalars page: does it beat the fixed policies, does it learn, what does it try."""
    bands = [
        margin(f"{r.name}: mean, 10 to 90 %", *(f"coefficients/{r.name}_{about}" for about in ("q10", "mean", "q90")))
        for r in RANGES
    ]
    judged = [
        lines(f"{meaning} ({unit})", [f"evaluation/{name}_{policy}" for policy in ("learned", *FIXED)])
        for name, unit, meaning in MEASURES.values()
    ]
    return {
        **({"evaluation: learned beside the fixed policies": judged} if has_evaluation else {}),
        "episodes": [lines("return", ["episodes/return"]), lines("rounds", ["episodes/rounds"])],
        "coefficients: what is tried": bands,
    }


class EventOutput(KVWriter):
    """Takes what an algorithm's logger dumps, and writes it as a run's tracker would."""

    def __init__(self, folder: Path, config: Any, after: int = 0) -> None:
        """`after`: the step of the checkpoint that the training goes on from; what came later is forgotten."""
        explained = {}
        for tag in TAGS:
            names = [r.name for r in RANGES] if "{coefficient}" in tag.name else ["learned", *FIXED]
            for name in names:
                explained[tag.name.replace("{coefficient}", name).replace("{policy}", name)] = description(tag)
        self.writer = EventWriter(folder, lambda said: print(said, file=sys.stderr), explained, after)
        self.config = config
        self._begun = self.writer.continues

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        shown = {key: v for key, v in key_values.items() if "tensorboard" not in (key_excluded.get(key) or ())}
        scalars = {key: float(v) for key, v in shown.items() if isinstance(v, (int, float, np.number))}
        arrays = {key: np.asarray(v) for key, v in shown.items() if isinstance(v, (np.ndarray, torch.Tensor))}
        if not self._begun:
            self._begin(step)
        self.writer.add(Point(scalars, arrays), step)

    def _begin(self, step: int) -> None:
        judges = self.config.evaluate_seeds > 0
        final = [f"evaluation/{name}_learned" for name, _, _ in MEASURES.values()] if judges else ["episodes/return"]
        self.writer.add_text("plan", PREFACE + tables(TAGS, GROUPS), step)
        self.writer.add_hparams(settings_of(self.config), {t: t for t in final}, step, ("algorithm", "steps", "seed"))
        self.writer.add_layout(layout(judges), step)
        self._begun = True

    def close(self) -> None:
        self.writer.close()


if __name__ == "__main__":
    print(tables(TAGS, GROUPS))
