"""The plan of what TensorBoard shows: one table of tags that the writer, the documentation and the tests read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ssdkd.coefficients import RANGES, Range
from ssdkd.tracking.whatif import formula_at


@dataclass(frozen=True)
class Moment:
    """One round as the tags see it."""

    line: Mapping[str, float]  # the line of metrics.jsonl
    before: Mapping[str, float]  # the statistics of the round before
    neutral_cost: float  # budget units of a round of effort 1
    buffer_capacity: int
    since: Mapping[str, float] = field(default_factory=dict)  # gone by since the last point: see Tracker
    memory: Mapping[str, float] = field(default_factory=dict)  # MiB in use: "host", "gpu"
    policy: Mapping[str, float] = field(default_factory=dict)  # what the policy says of itself
    totals: Mapping[str, float | None] = field(default_factory=dict)  # the summary, at the end


Read = Callable[[Moment], "float | None"]


@dataclass(frozen=True)
class Tag:
    """One curve, histogram or picture. A name with {braces} stands for several."""

    name: str
    kind: str  # scalar, histogram or picture
    unit: str
    meaning: str
    source: str  # where the value comes from
    read: Read | None = None  # for scalars; None from it: there is no such value now
    family: Callable[[Moment], dict[str, float]] | None = None  # for names with braces: what they stand for -> value


GROUPS: dict[str, str] = {
    "policy": "what was decided, and what it was worth",
    "buffer": "what was kept",
    "selection": "how sharply replay selects, and by what",
    "inversion": "how the new images came about",
    "student": "whether it helped",
    "time": "what it cost",
    "final": "the run in a few numbers, for the HParams page",
    "reference": "the dashed companions of policy/: what neutral and ssdkd coefficients would be",
    "spread": "the edges of the bands on the Custom Scalars page",
}


def _metric(key: str, scale: float = 1.0) -> Read:
    def read(moment: Moment) -> float | None:
        value = moment.line.get(key)
        return None if value is None else scale * value

    return read


def _scalar(name: str, unit: str, meaning: str, source: str, read: Read) -> Tag:
    return Tag(name, "scalar", unit, meaning, source, read)


def _logged(name: str, unit: str, meaning: str, key: str, scale: float = 1.0) -> Tag:
    times = f"{scale:g} times " if scale != 1.0 else ""
    return _scalar(name, unit, meaning, f"{times}`{key}` of metrics.jsonl", _metric(key, scale))


def _coefficient(entry: Range) -> Tag:
    def read(moment: Moment) -> float:
        return round(moment.line[entry.name], 6)  # an action is float32: -3e-8 is 0

    meaning, source = f"coefficient: {entry.steers}", f"`{entry.name}` of metrics.jsonl, to six places"
    return _scalar(f"policy/{entry.name}", "", meaning, source, read)


def _cost(moment: Moment) -> float:
    return max((moment.line["spent"] - moment.before["spent"]) / moment.neutral_cost, 1e-3)


def _neutral(moment: Moment) -> dict[str, float]:
    return {entry.name: entry.neutral for entry in RANGES}


def _ssdkd(moment: Moment) -> dict[str, float]:
    return {entry.name: formula_at(entry, moment.before["progress"]) for entry in RANGES}


def _terms(moment: Moment) -> dict[str, float]:
    return {key.removeprefix("term_"): v for key, v in moment.line.items() if key.startswith("term_")}


def _phases(moment: Moment) -> dict[str, float]:
    shares = {key.removeprefix("phase_"): v for key, v in moment.since.items() if key.startswith("phase_")}
    total = max(sum(shares.values()), 1e-9)
    return {name: 100.0 * seconds / total for name, seconds in shares.items()}


def _per_second(key: str) -> Read:
    def read(moment: Moment) -> float | None:
        return moment.since[key] / max(moment.since["seconds"], 1e-9) if key in moment.since else None

    return read


def _quantiles(facts: tuple[tuple[str, str, str, str], ...]) -> list[Tag]:
    """The median under buffer/, the edges of the band under spread/."""
    found = []
    for key, name, unit, meaning in facts:
        found.append(_logged(f"buffer/{name}_median", unit, f"{meaning}: median over the buffer", f"{key}_q50"))
        for edge in (10, 90):
            found.append(_logged(f"spread/{name}_q{edge}", unit, f"{meaning}: {edge} % quantile", f"{key}_q{edge}"))
    return found


SPREADS = (
    ("confidence", "confidence", "", "teacher's confidence"),
    ("delta", "kl_nats", "nats", "KL(teacher, student) last seen"),
    ("age", "age_rounds", "rounds", "time since it entered"),
    ("visits", "replays_per_image", "times", "how often it was replayed"),
)

WHAT_IF = "the round's coefficients (grey: neutral, orange: ssdkd; shaded: 80 % of the buffer)"

TAGS: tuple[Tag, ...] = (
    *(_coefficient(entry) for entry in RANGES),
    _logged("policy/reward", "nats per neutral round", "what the round was worth to the policy", "reward"),
    _scalar(
        "policy/reward_kl_fall_nats",
        "nats",
        "first part of the reward: log(KL before / KL after) on the probe",
        "`policy/reward` times `policy/reward_cost_rounds`",
        lambda moment: moment.line["reward"] * _cost(moment),
    ),
    _scalar(
        "policy/reward_cost_rounds",
        "rounds of effort 1",
        "second part, the divisor: what the round cost",
        "the rise of `spent` of metrics.jsonl, in rounds of effort 1",
        _cost,
    ),
    Tag(
        "policy/{about}",
        "scalar",
        "",
        "what a learned policy says of itself, such as its value estimate and the spread of its actions",
        "`diagnostics()` of the policy, where it has one",
        family=lambda moment: dict(moment.policy),
    ),
    _logged("buffer/class_entropy", "1 = even", "class balance: entropy over log C", "class_entropy"),
    _logged("buffer/class_share_min_percent", "%", "share of the rarest class", "class_share_min", 100.0),
    _logged("buffer/class_share_max_percent", "%", "share of the commonest class", "class_share_max", 100.0),
    _logged("buffer/fill_percent", "%", "how full the buffer is", "buffer_fill", 100.0),
    _scalar(
        "buffer/turnover_percent",
        "% of capacity",
        "images that entered in this round",
        "`accepted` of metrics.jsonl, over the capacity",
        lambda moment: 100.0 * moment.line["accepted"] / moment.buffer_capacity,
    ),
    *_quantiles(SPREADS),
    Tag("buffer/confidence", "histogram", "", "teacher's confidence over the buffer", "the buffer"),
    Tag("buffer/kl_log10_nats", "histogram", "log10 nats", "KL last seen over the buffer", "the buffer"),
    Tag(
        "buffer/keep_probability_times_mean",
        "histogram",
        "1 = average",
        "how likely each image is kept, over the mean, by class size, confidence and times replayed",
        "the modulating function under the round's coefficients",
    ),
    Tag(
        "buffer/replay_probability_times_mean",
        "histogram",
        "1 = average",
        "P times N: how likely each image was drawn for replay",
        "the priority function under the round's coefficients",
    ),
    Tag("buffer/images", "picture", "", "images by class, from most to least replayed, with the count", "the buffer"),
    Tag("buffer/classes", "picture", "images", "how many images of each class", "the buffer"),
    _logged(
        "selection/effective_sample_size_percent",
        "% of the buffer",
        "how many images replay draws from, in effect: 100 when all alike",
        "replay_ess",
        100.0,
    ),
    _logged(
        "selection/replay_share_of_top_decile_percent",
        "% of replay",
        "what the most replayed tenth of the images receives: 10 when all alike",
        "replay_top_decile",
        100.0,
    ),
    *(
        Tag(f"selection/what_if_{name}", "picture", "times the median sample", meaning, WHAT_IF)
        for name, meaning in (
            ("kept", "how likely a sample is kept, by class size, by confidence and by times replayed alone"),
            ("replayed_by_kl", "how likely it is replayed (P), and its weight in the loss, by KL alone"),
            ("replayed_by_phi", "how likely it is replayed (P) by class size and by confidence alone"),
        )
    ),
    Tag(
        "inversion/{term}",
        "scalar",
        "",
        "each term of the inversion loss before its weight, at the last step of the search, and `loss`, their weighted "
        "sum, with a generator at its best step",
        "`term_*` of metrics.jsonl",
        family=_terms,
    ),
    _logged(
        "inversion/candidate_confidence_median",
        "",
        "teacher's confidence in the newest candidates",
        "candidate_confidence_q50",
    ),
    _logged(
        "inversion/candidate_kl_nats_median",
        "nats",
        "what the student has to learn from the newest candidates",
        "candidate_delta_q50",
    ),
    _logged("inversion/images_made", "images", "synthetic images made so far", "synthesized"),
    _logged("student/probe_kl_nats", "nats", "KL(teacher, student) on the probe, never trained on", "probe_kl"),
    _logged("student/probe_agreement_percent", "%", "probe images named alike", "probe_agreement", 100.0),
    _logged("student/replay_agreement_percent", "%", "replayed images named alike", "replay_agreement", 100.0),
    _logged("student/replay_loss", "", "weighted distillation loss, mean of the round", "replay_loss"),
    _logged("student/learning_rate", "", "learning rate of the round", "learning_rate"),
    _logged("student/steps_per_round", "steps", "student steps in the round", "student_steps"),
    _logged("student/images_per_step", "images", "images of each of them", "student_batch"),
    _logged("student/budget_percent", "%", "share of the compute budget spent", "progress", 100.0),
    _logged("student/accuracy_percent", "%", "accuracy on the evaluation set, on rounds that measure it", "accuracy"),
    Tag(
        "time/{phase}_percent",
        "scalar",
        "% of the time",
        "share of each phase since the last point: inversion, replay, evaluation, tracking (this), rest",
        "the engine's clock",
        family=_phases,
    ),
    _scalar("time/seconds_per_round", "s", "work of a round, mean since the last point", "the engine's clock",
            lambda moment: moment.since["seconds"] / moment.since["rounds"] if moment.since.get("rounds") else None),
    _scalar("time/images_made_per_second", "images/s", "candidates made, since the last point", "the engine's clock",
            _per_second("made")),
    _scalar("time/images_learned_per_second", "images/s", "images replayed, since the last point",
            "the engine's clock", _per_second("learned")),
    _scalar("time/memory_mib", "MiB", "memory of the process", "the operating system",
            lambda moment: moment.memory.get("host")),
    _scalar("time/gpu_memory_mib", "MiB", "largest memory in use on the GPU so far", "PyTorch; only on a GPU",
            lambda moment: moment.memory.get("gpu")),
    *(
        _scalar(f"final/{name}", unit, meaning, f"`{key}` of summary.json", lambda moment, k=key: moment.totals.get(k))  # type: ignore[misc]
        for name, unit, meaning, key in (
            ("student_accuracy_percent", "%", "accuracy of the student handed out", "student_accuracy"),
            ("probe_agreement_percent", "%", "probe images named alike", "probe_agreement"),
            ("probe_kl_nats", "nats", "KL on the probe", "probe_kl"),
            ("seconds", "s", "work, evaluation not counted", "seconds"),
        )
    ),
    Tag("reference/{coefficient}_neutral", "scalar", "", "the coefficient that steers nothing", "the coefficient table",
        family=_neutral),
    Tag("reference/{coefficient}_ssdkd", "scalar", "", "what the SSD-KD formula would choose now",
        "the coefficient table and the progress", family=_ssdkd),
)  # fmt: skip
FINAL = "final/"
MEASURED_NOW_AND_THEN = ("student/accuracy_percent",)  # written whenever there is a value


def group_of(tag: Tag) -> str:
    return tag.name.split("/")[0]


def description(tag: Tag) -> str:
    """What TensorBoard shows of a tag on request."""
    unit = f" ({tag.unit})" if tag.unit else ""
    return f"{tag.meaning}{unit}. From {tag.source}."


def scalars(moment: Moment, wanted: Callable[[Tag], bool] = lambda tag: True) -> dict[str, float]:
    """The values of all scalars that there are at this moment."""
    values: dict[str, float] = {}
    for tag in TAGS:
        if tag.kind != "scalar" or not wanted(tag):
            continue
        if tag.family is not None:
            before, rest = tag.name.split("{")
            after = rest.split("}")[1]
            values |= {f"{before}{name}{after}": v for name, v in tag.family(moment).items()}
        elif tag.read is not None:
            value = tag.read(moment)
            if value is not None:
                values[tag.name] = value
    return values


def tables(tags: Sequence[Tag] = TAGS, groups: Mapping[str, str] = GROUPS) -> str:
    """A plan as the documentation shows it: a table for each group, in Markdown."""
    parts = []
    for group, about in groups.items():
        parts += [f"### {group}/: {about}", "", "| tag | meaning | unit | from |", "| --- | --- | --- | --- |"]
        for tag in tags:
            if group_of(tag) == group:
                kind = "" if tag.kind == "scalar" else f"{tag.kind}: "
                parts.append(f"| `{tag.name}` | {kind}{tag.meaning} | {tag.unit} | {tag.source} |")
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    print(tables())
