"""A report that needs nothing: `python -m ssdkd.report RUN [RUN ...] [--out FILE]` writes one HTML file.

It is made from what lies in the run folders, opens without a network, and compares where several runs are given.
"""

from __future__ import annotations

import base64
import html
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ssdkd.coefficients import RANGES, Coefficients
from ssdkd.config import read_yaml
from ssdkd.errors import Parser, SsdkdError, run_command
from ssdkd.files import atomic_write_text, expanded
from ssdkd.tracking.charts import BLUE, COLOURS, GREEN, GREY, ORANGE, PURPLE, Band, Chart, Line, to_svg
from ssdkd.tracking.display import times_fewer
from ssdkd.tracking.folder import CONFIG, METRICS, PICTURE, REPLAYS, REPORT, SUMMARY, RunFolder
from ssdkd.tracking.metrics import read_metrics
from ssdkd.tracking.whatif import formula_at, what_if

MOST_POINTS = 240  # of a curve; more cannot be told apart
TASK = ("dataset", "teacher.name", "student.name")  # whose values speak for themselves
REPEATED = ("seed", "threads", "device")  # runs that differ in these alone are repetitions
POLICY_COLOURS = {"uniform": GREY, "random": PURPLE, "ssdkd": ORANGE, "learned": BLUE}


@dataclass(frozen=True)
class Record:
    """What a run folder tells."""

    path: Path
    config: dict[str, Any]
    lines: list[dict[str, float]]
    summary: dict[str, Any]  # empty where the run did not come to its end
    picture: bytes | None
    ranked: bool = True  # whether the picture goes by replays, not by the teacher's confidence

    @property
    def policy(self) -> str:
        return str(self.config.get("policy", "?"))

    @property
    def last(self) -> dict[str, float]:
        return self.lines[-1]

    def values(self, key: str, scale: float = 1.0) -> list[float]:
        """A column of the metrics, not a number where a line lacks it."""
        found = (line.get(key) for line in self.lines)
        return [math.nan if value is None else scale * value for value in found]


@dataclass(frozen=True)
class Curve:
    """One run, or one group of runs, under one name and colour."""

    label: str
    colour: str
    runs: list[Record]


# Numbers of a summary that the page cannot do without, and those that it shows where they are known.
_TOLD = ("teacher_parameters", "student_parameters", "buffer_images", "synthesized_images", "seconds")
_MEASURED = ("teacher_accuracy", "student_accuracy")


def read_run(path: str | os.PathLike[str]) -> Record:
    """Read a run folder, of a run that is finished, going on, or was killed.

    Raises:
        SsdkdError: it is not a run folder, or no round of it was noted yet.
    """
    folder = RunFolder.existing(path)
    config, _ = read_yaml(str(folder / CONFIG))
    try:
        lines = read_metrics(folder / METRICS)
    except OSError as error:
        raise SsdkdError(f"{folder / METRICS} cannot be read: {error.strerror or error}.") from error
    if not lines:
        raise SsdkdError(f"{folder / METRICS} holds no round yet; wait for the first one.")
    summary = folder.read_json(SUMMARY) if (folder / SUMMARY).is_file() else {}
    if lacking := _lacking(summary):
        raise SsdkdError(f"{folder / SUMMARY} has no number for {lacking[0]}: is it of another version of ssdkd?")
    _end_the_accuracy(lines, summary)
    tracking = config.get("tracking")
    without = isinstance(tracking, dict) and tracking.get("images") is False
    pictures = [folder / name for name in (REPLAYS, PICTURE) if not without and (folder / name).is_file()]
    shown = pictures[0] if pictures else None
    return Record(
        folder.path.resolve(),
        config,
        lines,
        summary,
        shown.read_bytes() if shown else None,
        shown is None or shown.name == REPLAYS,
    )


def _lacking(summary: Mapping[str, Any]) -> list[str]:
    """What should be a number in a summary, and is none; an unfinished run's is empty."""
    told = {name: summary.get(name) for name in _TOLD if summary}
    if any(summary.get(name) is not None for name in _MEASURED):
        told |= {name: summary.get(name) for name in _MEASURED}
    phases = summary.get("phase_seconds", {})
    told |= phases if isinstance(phases, dict) else {"phase_seconds": phases}
    return [name for name, value in told.items() if not isinstance(value, (int, float))]


def _end_the_accuracy(lines: list[dict[str, float]], summary: Mapping[str, Any]) -> None:
    """The curve of accuracy ends with the student handed out, also where its last round measured none."""
    final, last = summary.get("student_accuracy"), lines[-1]
    if final is not None and last["round"] == summary.get("rounds") and any("accuracy" in line for line in lines):
        last.setdefault("accuracy", final)


def write_report(folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> None:
    """Write the report of one run, or the comparison of several, whole or not at all."""
    atomic_write_text(out, report([read_run(folder) for folder in folders]))


def report(runs: Sequence[Record]) -> str:
    """The page, as text."""
    title = runs[0].path.name if len(runs) == 1 else f"{len(runs)} runs compared"
    body = _of_one(runs[0]) if len(runs) == 1 else _of_several(runs)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head>"
        f"<body><main><h1>{_text(title)}</h1>{body}</main></body></html>\n"
    )


# -- one run ------------------------------------------------------------------------------------------------


def _of_one(run: Record) -> str:
    rounds = run.values("round")
    curves = [Curve("", BLUE, [run])]
    coefficients = []
    progress = [0.0, *run.values("progress")[:-1]]
    for entry in RANGES:
        formula = [formula_at(entry, p if math.isfinite(p) else 0.0) for p in progress]
        shown = [
            _line(run.policy if run.policy != "ssdkd" else "this run", rounds, run.values(entry.name), BLUE),
            _line("neutral", rounds, [entry.neutral] * len(rounds), GREY, True),
            _line("ssdkd", rounds, formula, ORANGE, True),
        ]
        coefficients.append(Chart(entry.name, "round", shown, y_range=(entry.low, entry.high), caption=entry.steers))
    reward = _curve_chart("Reward of each round", "reward", curves)
    agreement = Chart(
        "Agreement with the teacher, accuracy (%)",
        "round",
        [
            _line("probe", rounds, run.values("probe_agreement", 100.0), BLUE),
            _line("replayed", rounds, run.values("replay_agreement", 100.0), GREEN),
            *_accuracy(run),
        ],
    )
    shares = Chart(
        "Share of the rarest and the commonest class (%)",
        "round",
        [
            _line("rarest", rounds, run.values("class_share_min", 100.0), BLUE),
            _line("commonest", rounds, run.values("class_share_max", 100.0), ORANGE),
        ],
    )
    searched = {key for line in run.lines for key in line if key.startswith("term_")}  # none where all are textures
    inversion = [
        _curve_chart(key.removeprefix("term_"), key, curves)
        for key in sorted(searched, key=lambda key: (key != "term_loss", key))
    ]
    return "".join(
        [
            _verdict(run),
            _section("Did it help?", _charts([_kl_chart(curves, "round"), agreement, reward])),
            _section("What the policy did", _charts(coefficients)),
            _section(
                "What was kept",
                _charts(
                    [
                        shares,
                        _curve_chart("Images that entered per round", "accepted", curves),
                        _band_chart(run, "confidence", "Teacher's confidence"),
                        _band_chart(run, "delta", "KL last seen (nats)", log=True),
                        _band_chart(run, "age", "Age of the images (rounds)"),
                        _band_chart(run, "visits", "Replays of an image"),
                    ]
                ),
                "Bands hold 80 % of the buffer, the line is the median.",
            ),
            _section(
                "What was replayed",
                _charts(
                    [
                        _curve_chart("Effective sample size (% of the buffer)", "replay_ess", curves, scale=100.0),
                        _curve_chart("Replay share of the top decile (%)", "replay_top_decile", curves, scale=100.0),
                    ]
                ),
            ),
            _why(_complete(run.last)),
            _section("How the images came about", _charts(inversion), "Loss terms before their weights."),
            _picture(run),
            _section("Where the time went", _time_bar(run)),
            _settings(run),
        ]
    )


def _verdict(run: Record) -> str:
    s, last = run.summary, run.last
    cards: list[tuple[str, str, str]] = []
    if s.get("student_accuracy") is not None:
        cards.append((f"{s['student_accuracy']:.2f} %", "student accuracy", f"teacher {s['teacher_accuracy']:.2f} %"))
    agreement = 100.0 * (last.get("probe_agreement") or 0.0)
    cards.append((f"{agreement:.1f} %", "named as by the teacher", f"on the probe; KL {last.get('probe_kl') or 0:.3g}"))
    if s:
        times, which = times_fewer(s["teacher_parameters"], s["student_parameters"])
        cards.append((times, f"{which} parameters", f"{s['student_parameters']:,} in the student"))
        cards.append((f"{s['buffer_images']:,}", "synthetic images kept", f"of {s['synthesized_images']:,} made"))
    seconds = last.get("seconds") or 0.0
    cards.append((_duration(seconds), "of work", f"{last['round']:.0f} rounds by {run.policy}"))
    state = "" if s else '<p class="note">The run has not come to its end; this is how far it went.</p>'
    shown = "".join(
        f'<div class="card"><b>{_text(big)}</b><span>{_text(what)}</span><small>{_text(more)}</small></div>'
        for big, what, more in cards
    )
    return f'{state}<div class="cards">{shown}</div>'


_RANKED = "from the most to the least replayed; the count stands under each, the frame darkens with it"
_BY_CONFIDENCE = "the one that the teacher is surest of first"


def _picture(run: Record) -> str:
    if run.picture is None:
        return ""
    return _section(
        "The images",
        _image(run),
        f"A row for each class, up to the twentieth, {_RANKED if run.ranked else _BY_CONFIDENCE}. All of them are "
        "synthetic.",
    )


def _image(run: Record) -> str:
    data = base64.b64encode(run.picture or b"").decode("ascii")
    return f'<img alt="synthetic images by class" src="data:image/png;base64,{data}">'


def _time_bar(run: Record) -> str:
    phases = {name: s for name, s in run.summary.get("phase_seconds", {}).items() if s > 0}
    total = sum(phases.values())
    if not total:
        return '<p class="note">Known when the run is finished.</p>'
    parts, key = [], []
    for (name, seconds), colour in zip(phases.items(), COLOURS, strict=False):
        share = 100.0 * seconds / total
        parts.append(f'<i style="width:{share:.2f}%;background:{colour}"></i>')
        key.append(
            f'<span><i style="background:{colour}"></i>{_text(name)} {share:.0f} % ({_duration(seconds)})</span>'
        )
    made = run.summary.get("synthesized_images", 0) / max(run.summary.get("seconds", 0.0), 1e-9)
    return (
        f'<div class="bar">{"".join(parts)}</div><p class="key">{"".join(key)}</p>'
        f'<p class="note">{made:,.0f} images made per second, on {_text(run.summary.get("device", "?"))}.</p>'
    )


def _settings(run: Record) -> str:
    rows = "".join(
        f"<tr><td>{_text(e.name)}</td><td>{_text(e.steers)}</td><td>{e.neutral:g}</td>"
        f"<td>{' → '.join(f'{v:g}' for v in dict.fromkeys(e.formula))}</td>"
        f"<td>{np.nanmean(run.values(e.name)):.3g}</td>"
        f"<td>{np.nanmin(run.values(e.name)):.3g} to {np.nanmax(run.values(e.name)):.3g}</td></tr>"
        for e in RANGES
        if e.name in run.last
    )
    table = (
        '<div class="wide"><table><tr><th>coefficient</th><th>steers</th><th>neutral</th><th>ssdkd</th>'
        f"<th>mean here</th><th>from, to</th></tr>{rows}</table></div>"
    )
    text = yaml.safe_dump({k: v for k, v in run.config.items() if k != "data_root"}, sort_keys=False)
    return _section(
        "Settings",
        f"<details><summary>The coefficients in numbers</summary>{table}</details>"
        f"<details><summary>The configuration</summary><pre>{_text(text)}</pre></details>",
    )


def _accuracy(run: Record) -> list[Line]:
    measured = [(line["round"], line["accuracy"]) for line in run.lines if line.get("accuracy") is not None]
    if not measured:
        return []
    x, y = zip(*measured, strict=True)
    lines = [_line("accuracy", x, y, ORANGE)]
    teacher = run.summary.get("teacher_accuracy")
    if teacher is not None:
        lines.append(_line("teacher", [run.lines[0]["round"], run.last["round"]], [teacher] * 2, GREY, True))
    return lines


def _band_chart(run: Record, key: str, title: str, log: bool = False) -> Chart:
    x = run.values("round")
    low, middle, high = (run.values(f"{key}_q{q}") for q in (10, 50, 90))
    rows = _thinned(len(x))
    band = Band(_at(x, rows), _at(low, rows), _at(high, rows))
    return Chart(title, "round", [_line("", x, middle, BLUE)], [band], log_y=log)


def _complete(line: Mapping[str, float | None]) -> dict[str, float]:
    """A line of which nothing is missing: what was not a number counts as 0, a coefficient unknown then as neutral."""
    return Coefficients().as_dict() | {key: 0.0 if value is None else value for key, value in line.items()}


def _why(last: Mapping[str, float]) -> str:
    """The what-if panels of a round; nothing where another version noted other facts of it."""
    try:
        panels = what_if(last, last)
    except KeyError:
        return ""
    return _section(
        "Why: how likely a sample is kept and replayed",
        _charts(panels),
        "By each feature alone, in the last round; 1 is the median sample, shaded is where 80 % of the buffer lies.",
    )


# -- several runs -------------------------------------------------------------------------------------------


def _of_several(runs: Sequence[Record]) -> str:
    curves = _grouped(runs)
    charts = [
        _kl_chart(curves, "progress"),
        _curve_chart("Probe images named as by the teacher (%)", "probe_agreement", curves, "progress", 100.0),
    ]
    if any("accuracy" in line for run in runs for line in run.lines):
        charts.append(_curve_chart("Accuracy (%)", "accuracy", curves, "progress"))
    coefficients = [
        replace(_curve_chart(e.name, e.name, curves, "progress"), y_range=(e.low, e.high), caption=e.steers)
        for e in RANGES
    ]
    buffer = [
        _curve_chart("Class balance (1 is even)", "class_entropy", curves, "progress"),
        _curve_chart("Teacher's confidence, median", "confidence_q50", curves, "progress"),
        _curve_chart("KL last seen, median (nats)", "delta_q50", curves, "progress"),
        _curve_chart("Effective sample size (%)", "replay_ess", curves, "progress", 100.0),
        _curve_chart("Replay share of the top decile (%)", "replay_top_decile", curves, "progress", 100.0),
        _curve_chart("Images that entered per round", "accepted", curves, "progress"),
    ]
    several = any(len(curve.runs) > 1 for curve in curves)
    note = "Over the share of the compute budget, which is the same axis for all."
    if several:
        note += " Thick: mean of a policy's runs; thin: each run."
    firsts = [curve.runs[0] for curve in curves if curve.runs[0].picture is not None]
    pictures = "".join(
        f"<figure><figcaption>{_text(run.path.name)}</figcaption>{_image(run)}</figure>" for run in firsts
    )
    return "".join(
        [
            _table(runs, curves),
            _section("Did it help?", _charts(charts), note),
            _section("What the policies did", _charts(coefficients)),
            _section("What was kept and replayed", _charts(buffer)),
            _section("The images", f'<div class="grids">{pictures}</div>', "The first run of each.")
            if pictures
            else "",
            _differences(runs),
        ]
    )


def _grouped(runs: Sequence[Record]) -> list[Curve]:
    """By policy, and what else tells more than repetitions apart, where policies differ; else each run for itself."""
    settings = [_flat(run.config) for run in runs]
    if len({run.policy for run in runs}) > 1:
        told: list[str] = []
        for key in (*TASK, *(key for key in _varied(settings) if key not in REPEATED)):
            if _kinds(settings, ["policy", *told, key]) > _kinds(settings, ["policy", *told]):
                told.append(key)
        groups: dict[tuple[str, ...], list[Record]] = {}  # by values, since two files may have one name
        for run, each in zip(runs, settings, strict=True):
            groups.setdefault((run.policy, *(repr(each.get(key)) for key in told)), []).append(run)
        found = []
        for number, alike in enumerate(groups.values()):
            own = _flat(alike[0].config)
            named = (f"{'' if key in TASK else f'{_last_part(key)} '}{_in_short(own.get(key))}" for key in told)
            name = ", ".join([alike[0].policy, *named])
            found.append(Curve(name, POLICY_COLOURS.get(name, COLOURS[number % len(COLOURS)]), alike))
        return found
    telling = _telling(settings)
    found = []
    for number, run in enumerate(runs):
        named = (f"{_last_part(key)} {_in_short(settings[number].get(key))}" for key in telling)
        found.append(Curve(", ".join(named) or f"run {number + 1}", COLOURS[number % len(COLOURS)], [run]))
    return found


def _telling(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """At most two of the settings that differ: those that tell most runs apart."""
    keys = _varied(settings)
    told: list[str] = []
    while keys and len(told) < 2:
        best = max(keys, key=lambda key: _kinds(settings, [*told, key]))
        if told and _kinds(settings, [*told, best]) == _kinds(settings, told):
            break
        told.append(best)
    return told


def _kinds(settings: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> int:
    """How many kinds of run these settings tell apart."""
    return len({tuple(repr(each.get(key)) for key in keys) for each in settings})


def _table(runs: Sequence[Record], curves: Sequence[Curve]) -> str:
    columns: list[tuple[str, Callable[[Record], float | None], str]] = [
        ("accuracy %", lambda r: r.summary.get("student_accuracy", r.last.get("accuracy")), ".2f"),
        ("teacher %", lambda r: r.summary.get("teacher_accuracy"), ".2f"),
        ("agreement %", lambda r: 100.0 * (r.last.get("probe_agreement") or 0.0), ".2f"),
        ("probe KL", lambda r: r.last.get("probe_kl"), ".4f"),
        ("rounds", lambda r: r.last["round"], ".0f"),
        ("images made", lambda r: r.last.get("synthesized"), ",.0f"),
        ("seconds", lambda r: r.last.get("seconds"), ".1f"),
    ]
    columns = [column for column in columns if any(column[1](run) is not None for run in runs)]
    head = "".join(f"<th>{_text(name)}</th>" for name, _, _ in columns)
    rows = []
    for curve in curves:
        for run in curve.runs:
            cells = "".join(f"<td>{_number(read(run), form)}</td>" for _, read, form in columns)
            dot = f'<i class="dot" style="background:{curve.colour}"></i>'
            mark = "" if run.summary else " (not finished)"
            seed = run.config.get("seed", "?")
            rows.append(
                f"<tr><td>{dot}{_text(curve.label)}</td><td>{_text(seed)}</td>{cells}"
                f'<td class="name">{_text(run.path.name)}{mark}</td></tr>'
            )
        ended = [run for run in curve.runs if run.summary] or curve.runs  # a run half way would move the mean
        if len(ended) > 1:
            cells = "".join(f"<td>{_mean([read(run) for run in ended], form)}</td>" for _, read, form in columns)
            rows.append(f'<tr class="mean"><td>{_text(curve.label)}</td><td>mean</td>{cells}<td></td></tr>')
    head = f'<tr><th></th><th>seed</th>{head}<th class="name">folder</th></tr>'
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'


def _differences(runs: Sequence[Record]) -> str:
    settings = [_flat(run.config) for run in runs]
    rows = "".join(
        f"<tr><td>{_text(key)}</td>{''.join(f'<td>{_text(_as_in_yaml(s.get(key)))}</td>' for s in settings)}</tr>"
        for key in _varied(settings)
    )
    if not rows:
        return ""
    head = "".join(f"<th>{_text(run.path.name)}</th>" for run in runs)
    table = f'<table class="differ"><tr><th></th>{head}</tr>{rows}</table>'
    return _section("Settings that differ", f'<div class="wide">{table}</div>')


def _as_in_yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _last_part(key: str) -> str:
    """What a setting is called where there is little room: of a network's name, whose it is."""
    return key.removesuffix(".name").rsplit(".", 1)[-1]


def _in_short(value: Any) -> str:
    """A setting for where there is little room: of a path, the name."""
    text = _as_in_yaml(value)
    return Path(text).name or text


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _varied(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for each in settings for key in each)
    return [
        key
        for key in keys
        if not key.startswith(("tracking.", "checkpoint.", "out", "data_root"))
        and len({repr(each.get(key)) for each in settings}) > 1
    ]


# -- pieces -------------------------------------------------------------------------------------------------


def _kl_chart(curves: Sequence[Curve], over: str) -> Chart:
    return _curve_chart("KL(teacher, student) on the probe (nats)", "probe_kl", curves, over, log=True)


def _curve_chart(
    title: str,
    key: str,
    curves: Sequence[Curve],
    over: str = "round",
    scale: float = 1.0,
    log: bool = False,
) -> Chart:
    lines: list[Line] = []
    for curve in curves:
        across = 100.0 if over == "progress" else 1.0
        columns = [_without_gaps(run.values(over, across), run.values(key, scale)) for run in curve.runs]
        columns = [(x, y) for x, y in columns if x]
        if len(columns) == 1:
            lines.append(_line(curve.label, *columns[0], curve.colour))
        elif columns:
            lines += [_line("", x, y, curve.colour, width=0.6) for x, y in columns]
            grid = np.linspace(max(x[0] for x, _ in columns), min(x[-1] for x, _ in columns), MOST_POINTS)
            mean = np.mean([np.interp(grid, x, y) for x, y in columns], axis=0)
            lines.append(_line(curve.label, grid.tolist(), mean.tolist(), curve.colour, width=2.4))
    label = "compute budget spent (%)" if over == "progress" else over
    return Chart(title, label, lines, log_y=log)


def _without_gaps(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """What was measured only now and then, joined up."""
    both = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    return [a for a, _ in both], [b for _, b in both]


def _line(
    label: str, x: Sequence[float], y: Sequence[float], colour: str, dashed: bool = False, width: float = 1.8
) -> Line:
    rows = _thinned(len(x))
    return Line(label, _at(x, rows), _at(y, rows), colour, dashed, width)


def _thinned(length: int) -> list[int]:
    if length <= MOST_POINTS:
        return list(range(length))
    return sorted(set(np.linspace(0, length - 1, MOST_POINTS).round().astype(int).tolist()))


def _at(values: Sequence[float], rows: Sequence[int]) -> list[float]:
    return [values[row] for row in rows]


def _charts(charts: Sequence[Chart]) -> str:
    shown = []
    for chart in charts:
        caption = f"<figcaption>{_text(chart.caption)}</figcaption>" if chart.caption else ""
        shown.append(f"<figure>{to_svg(chart)}{caption}</figure>")
    return f'<div class="charts">{"".join(shown)}</div>'


def _section(title: str, body: str, note: str = "") -> str:
    below = f'<p class="note">{_text(note)}</p>' if note else ""
    return f"<section><h2>{_text(title)}</h2>{below}{body}</section>"


def _text(value: Any) -> str:
    return html.escape(str(value))


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _mean(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return format(sum(known) / len(known), form) if known else ""


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


STYLE = """
:root{color-scheme:light dark;--ink:#22262b;--soft:#6b7280;--paper:#fff;--card:#f5f6f8;--rule:#dfe2e6}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#9aa2ad;--paper:#16181b;--card:#1f2226;--rule:#33383f}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1240px;margin:0 auto;padding:20px}
h1{font-size:22px;overflow-wrap:anywhere}h2{font-size:18px;margin:32px 0 4px}
.note{color:var(--soft);margin:0 0 8px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px}
.card{background:var(--card);border-radius:8px;padding:12px}
.card b{display:block;font-size:22px;line-height:1.2}.card span{display:block}.card small{color:var(--soft)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:10px}
svg{width:100%;height:auto;display:block;background:var(--card);border-radius:8px}
svg text{fill:var(--ink);font-family:system-ui,sans-serif}svg .rule{stroke:var(--rule)}
img{max-width:100%;height:auto;border-radius:8px;background:#fff}
.grids{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr));gap:14px}
figure{margin:0}figcaption{color:var(--soft);font-size:13px;overflow-wrap:anywhere}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:5px 10px;border-bottom:1px solid var(--rule);text-align:right;white-space:nowrap}
th:first-child,td:first-child,td.name,th.name{text-align:left}
td.name{white-space:normal;overflow-wrap:anywhere;min-width:10em}.mean td{font-weight:600}
.differ :is(th,td):not(:first-child){white-space:normal;overflow-wrap:anywhere;min-width:9em}
details td:nth-child(2),details th:nth-child(2){text-align:left}
.dot{display:inline-block;width:10px;height:10px;border-radius:5px;margin-right:6px}
.bar{display:flex;height:22px;border-radius:6px;overflow:hidden}
.key span{display:inline-block;margin-right:14px}
.key i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:5px}
pre{overflow-x:auto;background:var(--card);border-radius:8px;padding:12px;font-size:13px}
summary{cursor:pointer;padding:6px 0}
"""


def run(argv: Sequence[str] | None) -> None:
    description = "Write one HTML file on a run, or on several in comparison."
    parser = Parser(prog="python -m ssdkd.report", description=description)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--out", metavar="FILE", help=f"where to; default: {REPORT} in the run folder, or here")
    given = parser.parse_args(argv)
    out = expanded(given.out or (Path(given.runs[0]) / REPORT if len(given.runs) == 1 else REPORT))
    try:
        write_report(given.runs, out)
    except OSError as error:
        raise SsdkdError(f"{out} cannot be written: {error.strerror or error}.") from error
    print(out)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; a user's mistake is one sentence and exit code 2."""
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
