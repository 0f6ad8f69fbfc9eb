"""Promises of the comparison of policies: its figures are what they say, and a finished run is not repeated."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from agents.adapt import AdaptivePolicy
from agents.evaluate import interquartile_mean
from agents.policies import load_policy
from benchmarks import selection, units
from benchmarks.selection import Outcome, area_until, as_table, compare, estimate, first_reached, rank_correlation
from envs.spaces import ENTRIES
from ssdkd import costs
from ssdkd.build import build_engine
from ssdkd.coefficients import RANGES
from ssdkd.config import RunConfig, build, read_yaml
from ssdkd.errors import ConfigError, NumericalError
from ssdkd.report import read_run
from ssdkd.saving import Stopped
from ssdkd.tracking import RunFolder

SMALL = [
    *("--rounds", "3", "--inversion.images", "16", "--inversion.warmup", "2", "--inversion.steps", "2"),
    *("--inversion.width", "8", "--buffer.capacity", "40", "--distillation.batch", "16", "--distillation.steps", "3"),
    *("--probe.images", "16"),
]
DIGITS_JOB = """
dataset: digits
rounds: 7
teacher: {name: convnet, arguments: {widths: [48, 96, 128]}, checkpoint: embedded}
student: {name: convnet_small}
"""
SCHEDULE = "late={alpha: [0, 0.6], effort: 2}"


def outcome(policy: str, seed: int, accuracy: list[float], pace: float = 1.0, kl: list[float] | None = None) -> Outcome:
    """A run whose points lie at equal distances of the budget; a round takes `pace` seconds."""
    rounds = len(accuracy) - 1
    return Outcome(
        task="t",
        policy=policy,
        seed=seed,
        shares=[i / rounds for i in range(rounds + 1)],
        seconds=[pace * i for i in range(rounds + 1)],
        accuracy=accuracy,
        probe_kl=kl or [math.exp(-a) for a in accuracy[1:]],
        final=accuracy[-1],
    )


# -- statistics -----------------------------------------------------------------------------------------------


def test_an_interquartile_mean_leaves_out_a_quarter_at_either_end() -> None:
    found = estimate([1.0, 2.0, 3.0, 1000.0])
    assert found.value == 2.5
    assert found.values == [1.0, 2.0, 3.0, 1000.0]
    assert estimate([4.0, 6.0]).value == 5.0


def test_the_interquartile_mean_is_that_of_the_published_tables() -> None:
    """A quarter that is no whole number is rounded down: of 10 seeds two are left out at either end."""
    random = np.random.default_rng(0)
    for seeds in (1, 2, 3, 4, 5, 7, 10, 20, 40):
        values = random.normal(size=(seeds, 6))
        assert interquartile_mean(values, axis=0) == pytest.approx(stats.trim_mean(values, 0.25, axis=0))
        assert interquartile_mean(values.T) == pytest.approx(interquartile_mean(values, axis=0))


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Of 200 samples of a normal distribution, 95 % or a little less, as a percentile bootstrap of 20 values does."""
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        sample = random.normal(3.0, 1.0, 20)
        low, high = stats.bootstrap(
            (sample,), interquartile_mean, n_resamples=500, method="percentile"
        ).confidence_interval
        inside += low <= 3.0 <= high
    assert 0.86 < inside / 200 < 0.99
    sample = random.normal(3.0, 1.0, 20)
    found = estimate(sample.tolist())
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.value < found.high
    assert found == estimate(sample.tolist()), "the same values give the same interval"


def test_intervals_are_those_of_95_percent_of_the_resampled_means() -> None:
    random = np.random.default_rng(3)
    sample = random.normal(50.0, 10.0, 20)
    low, high = np.quantile(interquartile_mean(random.choice(sample, (20_000, 20))), [0.025, 0.975])
    found = estimate(sample.tolist())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.3)
    edges = selection.band(np.stack([sample, 2.0 * sample], axis=1))
    assert np.concatenate(edges) == pytest.approx([low, 2 * low, high, 2 * high], abs=0.6)
    wider, low, high = (50.0 + 3.0 * (value - 50.0) for value in (sample, low, high))
    reached = selection.reaches(np.outer(wider, selection.GRID), np.full(20, 25.0))
    assert (reached["low"], reached["high"]) == pytest.approx((25.0 / high, 25.0 / low), abs=0.02)


def test_without_spread_or_with_one_seed_there_is_no_width() -> None:
    same = estimate([5.0, 5.0, 5.0])
    assert (same.low, same.value, same.high) == (5.0, 5.0, 5.0)
    one = estimate([5.0])
    assert (one.low, one.value, one.high) == (None, 5.0, None)


def test_an_area_in_time_is_cut_or_goes_on_level() -> None:
    assert area_until([0.0, 2.0], [0.0, 10.0], 1.0) == pytest.approx(2.5)
    assert area_until([0.0, 2.0, 3.0], [0.0, 10.0, 0.0], 1.0) == pytest.approx(2.5), "what comes later does not count"
    assert area_until([0.0, 2.0], [0.0, 10.0], 4.0) == pytest.approx(7.5)
    assert area_until([1.0, 2.0], [4.0, 8.0], 2.0) == pytest.approx(5.0), "before its first point it is level"


def test_where_a_curve_first_comes_to_a_value() -> None:
    assert first_reached([0.0, 0.5, 1.0], [1.0, 3.0, 2.0], 2.5) == 0.5
    assert first_reached([0.0, 1.0], [1.0, 2.0], 2.5) is None
    assert first_reached([0.0, 0.5, 1.0], [1.0, 2.0, 3.0], 2.0) == 0.5, "to come to it is enough"


def test_rank_correlation_of_progress_and_accuracy() -> None:
    assert rank_correlation([3.0, 2.0, 1.0], [10.0, 50.0, 60.0]) == pytest.approx(1.0)
    assert rank_correlation([1.0, 2.0, 3.0], [10.0, 50.0, 60.0]) == pytest.approx(-1.0)
    expected = stats.spearmanr([-3.0, -2.0, -2.5, -1.0], [1.0, 2.0, 3.0, 4.0]).statistic
    assert rank_correlation([3.0, 2.0, 2.5, 1.0], [1.0, 2.0, 3.0, 4.0]) == pytest.approx(expected)
    assert rank_correlation([3.0, 2.0], [10.0, 10.0]) is None
    assert rank_correlation([math.inf, 3.0, 2.0], [30.0, 10.0, 20.0]) == pytest.approx(1.0), "ruin is left out"


def test_policies_are_compared_at_equal_compute_and_at_equal_time() -> None:
    runs = [outcome("ssdkd", seed, [0.0, 40.0 + seed, 60.0 + seed]) for seed in range(4)]
    runs += [outcome("fast", seed, [0.0, 80.0 + seed, 90.0 + seed], pace=2.0) for seed in range(4)]
    found = compare(runs)
    ours, its = found["policies"]["fast"], found["policies"]["ssdkd"]
    assert found["seeds"] == [0, 1, 2, 3]
    assert its["final"]["value"] == pytest.approx(61.5)
    assert its["area"]["value"] == pytest.approx(0.5 * 20.75 + 0.5 * 51.5)
    assert ours["area_over_ssdkd"]["value"] == pytest.approx(ours["area"]["value"] - its["area"]["value"])
    assert ours["area_over_ssdkd"]["values"] == pytest.approx([27.5] * 4)
    assert its["area_over_ssdkd"]["value"] == 0.0
    early = ours["reaches_ssdkd"]
    assert early["value"] == pytest.approx(0.38), "61.5 of 81.5, which it has at half the budget"
    assert 0.36 < early["low"] <= 0.38 <= early["high"] < 0.4
    assert its["reaches_ssdkd"]["value"] == 1.0
    assert ours["final_in_time"]["value"] == pytest.approx(81.5), "after 2 s, when ssdkd is at its end"
    assert ours["area_in_time"]["value"] == pytest.approx(81.5 / 2)
    assert ours["rank_correlation"] == pytest.approx(1.0)


def test_a_run_ends_with_the_student_handed_out_and_its_middle_is_that_of_the_runs() -> None:
    kls = ([2.0, 1.0], [1.0, 2.0], [2.0, 1.0])
    runs = [
        replace(outcome("ssdkd", seed, [0.0, 50.0, 60.0], pace=4.0**seed, kl=kl), final=44.0 + seed)
        for seed, kl in enumerate(kls)
    ]
    found = compare(runs)["policies"]["ssdkd"]
    assert found["final"]["value"] == 45.0
    assert found["reaches_ssdkd"]["value"] == pytest.approx(0.45)
    assert found["rank_correlations"] == pytest.approx([1.0, -1.0, 1.0])
    assert (found["rank_correlation"], found["seconds"]) == pytest.approx((1.0, 8.0)), "medians"


def test_the_rank_correlation_of_a_run_leaves_its_untrained_student_out() -> None:
    found = compare([outcome("ssdkd", 0, [50.0, 10.0, 60.0, 40.0], kl=[3.0, 1.0, 2.0])])
    assert found["policies"]["ssdkd"]["rank_correlation"] == pytest.approx(1.0)


def test_a_picture_shows_for_each_policy_the_middle_of_its_seeds_over_compute_and_over_seconds() -> None:
    runs = [outcome("slow", seed, [0.0, 20.0, 40.0 + seed]) for seed in range(3)]
    runs += [outcome("fast", seed, [0.0, 60.0, 80.0 + seed], pace=2.0) for seed in range(3)]
    over_compute, over_time = selection.charts("t", runs)
    for chart, end, ends in ((over_compute, 100.0, (41.0, 81.0)), (over_time, 3.0, (41.0, 70.5))):
        assert [line.label for line in chart.lines] == ["slow", "fast"]
        assert [line.x[-1] for line in chart.lines] == [end] * 2
        assert [line.y[-1] for line in chart.lines] == pytest.approx(ends)
        assert all(b.low[-1] <= line.y[-1] <= b.high[-1] for b, line in zip(chart.bands, chart.lines, strict=True))


def test_a_policy_has_the_same_colour_in_whatever_order_the_runs_were_made() -> None:
    names = ["without_effort", "late", "mine", "ssdkd"]
    colours = [selection.colour_of(name, names) for name in names]
    assert len(set(colours)) == 4
    assert colours == [selection.colour_of(name, names[::-1]) for name in names]


def test_without_ssdkd_policies_are_compared_with_learned() -> None:
    runs = [outcome("learned", seed, [0.0, 40.0 + seed, 60.0 + seed]) for seed in range(4)]
    runs += [outcome("without_effort", seed, [0.0, 30.0 + seed, 60.0 + seed]) for seed in range(4)]
    found = compare(runs)
    assert found["policies"]["without_effort"]["area_over_learned"]["values"] == pytest.approx([-5.0] * 4)
    assert "area_over_learned" in as_table("digits", found)
    both = compare([*runs, *(outcome("ssdkd", seed, [0.0, 20.0 + seed, 60.0 + seed]) for seed in range(4))])
    assert both["policies"]["learned"]["area_over_ssdkd"]["values"] == pytest.approx([10.0] * 4)
    assert "area_over_learned" not in as_table("digits", both)


def test_a_policy_may_never_reach_what_ssdkd_reaches() -> None:
    runs = [outcome("ssdkd", seed, [0.0, 50.0 + seed]) for seed in range(3)]
    runs += [outcome("slow", seed, [0.0, 20.0]) for seed in range(3)]
    never = compare(runs)["policies"]["slow"]["reaches_ssdkd"]
    assert never == {"value": None, "low": None, "high": None}
    assert selection.shown(never) == "never"
    assert selection.shown({"value": 0.5, "low": 0.25, "high": None}) == "0.50 [0.25, never]"
    assert selection.shown(-0.001) == "0.00", "without a sign that means nothing"


def test_seeds_that_a_policy_lacks_are_left_out() -> None:
    runs = [outcome("ssdkd", 0, [0.0, 50.0]), outcome("ssdkd", 1, [0.0, 60.0]), outcome("random", 1, [0.0, 10.0])]
    assert compare(runs)["seeds"] == [1]
    with pytest.raises(ConfigError, match="no seed"):
        compare([runs[0], runs[2]])


def test_over_several_tasks_figures_and_curves_are_the_means_of_the_tasks() -> None:
    runs = [
        replace(outcome(policy, seed, [0.0, height + seed / 70, height + seed / 70]), task=task)
        for task, heights in {"low": (40.0, 60.0), "high": (80.0, 90.0), "middling": (60.1, 75.1)}.items()
        for policy, height in zip(("ssdkd", "fast"), heights, strict=True)
        for seed in range(40)
    ]
    found = selection.over_tasks([*runs, replace(runs[0], seed=40), replace(runs[40], seed=40)])
    assert found["tasks"] == ["low", "high", "middling"]
    assert found["seeds"] == list(range(40)), "the last is of one task alone"
    ours = found["policies"]["fast"]
    assert ours["final"]["value"] == pytest.approx(225.1 / 3 + 19.5 / 70)
    assert ours["area_over_ssdkd"]["value"] == pytest.approx(0.75 * 15.0)
    assert ours["reaches_ssdkd"]["value"] == pytest.approx(0.41), "60.2 of 75.2, which it has at half the budget"
    reached = found["policies"]["ssdkd"]["reaches_ssdkd"]
    assert reached == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5}), "its own, however sums are rounded"


# -- the script -----------------------------------------------------------------------------------------------


def test_the_whole_comparison_leaves_runs_figures_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "DEFAULT", tmp_path / "none.safetensors")
    out, results = tmp_path / "runs", tmp_path / "results.json"
    flags = ["--out", str(out), "--seeds", "2", "--json", str(results), *SMALL]
    policies = ["--policies", "uniform", "random", "ssdkd", "learned", SCHEDULE]
    assert selection.main([*flags, *policies]) == 0
    said = capsys.readouterr().out
    assert "learned is left out" in said
    found = json.loads(results.read_text())
    figures = found["tasks"]["digits"]["policies"]
    assert list(figures) == ["uniform", "random", "ssdkd", "late"]
    for name, told in figures.items():
        assert f"| {name} |" in said
        assert set(selection.COLUMNS) - {"area_over_learned"} <= set(told)
        assert 0 <= told["area"]["low"] <= told["area"]["value"] <= told["area"]["high"] <= 100
    with Image.open(out / "selection.png") as picture:
        picture.verify()
    folders = sorted(path for path in out.iterdir() if path.is_dir())
    assert [folder.name for folder in folders] == [
        f"digits-{name}-seed{seed}" for name in ("late", "random", "ssdkd", "uniform") for seed in (0, 1)
    ]
    runs = [read_run(folder) for folder in folders]
    assert {run.policy for run in runs} == {"uniform", "random", "ssdkd", "late"}
    starts = [r["accuracy"][0] for r in found["runs"] if r["seed"] == 1]
    assert len(set(starts)) == 1, "all policies of a seed start from the same student"
    late = next(run for run in runs if run.policy == "late")
    assert late.lines[0]["effort"] == pytest.approx(2.0, rel=1e-4)
    assert all(list(folder.glob("events.out.tfevents.*")) for folder in folders), "TensorBoard shows them"
    assert all(0.5 < run.last["progress"] <= 1.2 for run in runs), "the same budget for all"

    before = {folder: (folder / "summary.json").stat().st_mtime_ns for folder in folders}
    (out / "digits-uniform-seed1" / "summary.json").unlink()  # as if it had been cut off
    assert selection.main([*flags, *policies, "--plot", str(tmp_path / "plot.svg")]) == 0
    assert (tmp_path / "plot.svg").read_text().startswith("<svg ")
    again = [f for f in folders if (f / "summary.json").stat().st_mtime_ns != before[f]]
    assert [folder.name for folder in again] == ["digits-uniform-seed1"]
    capsys.readouterr()
    assert selection.main([*flags, *policies, "--student.arguments", "{widths: [4, 8, 8]}"]) == 2
    assert "another student" in capsys.readouterr().err
    assert selection.main([*flags, "--policies", "late={alpha: 0.1}"]) == 2
    assert "another set of coefficients" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--policies", "best"], "best"),
        (["--policies", "ssdkd", "{alfa: 1}"], "alfa"),
        (["--policies", "{alpha: 1}", "{alpha: 0.5}"], "twice"),
        (["--policies", "uniform", "ssdkd={alpha: 0.5}"], "twice"),
        (["--minutes", "1"], "equal compute"),
        (["--rounds", "null"], "equal compute"),
        (["--seeds", "0"], "seeds"),
        (["--first-seed", "-4"], "first-seed: at least 0"),
        (["--tasks", "mnist"], "--teacher"),
        (["--tasks", "mnist-400"], "task mnist-400 needs a teacher"),
        (["--tasks", "no_such_task"], "no_such_task"),
        (["--tasks", "a/job.yaml", "b/job.yaml"], "one name"),
        (["--policies", "ssdkd", "--ablate"], "--ablate"),
        (["--policies", "ssdkd", "--policy-file", "mine.safetensors"], "--policy-file is of a learned policy"),
        (["--plot", "plot.gif"], "--plot"),
        (["--coefficients", "set.gif"], "--coefficients"),
        (["--share", "0"], "--share: above 0 and at most 1"),
        (["--wisdom", "3"], "wisdom"),
        (["--seed", "3"], "--seed: every run has its own; give --first-seed and --seeds."),
        (["--policy=ssdkd"], "--policy: every run has its own; give --policies."),
        (["--config=mnist"], "--config: every run has its own; give --tasks."),
        (["--adapt", "true"], "adapt: name the policy adaptive"),
        (["--tracking.evaluate-every", "0"], "tracking.evaluate_every: 0 leaves no curve to compare"),
        (["--policies", "adaptive", "--coefficients", "set.png"], "--coefficients draws what the learned policy set"),
        (["--teacher", "mine.safetensors"], "--teacher is of other tasks than digits and held-out ones"),
        (["--data-root", "mine"], "--data-root is of other tasks than digits and held-out ones"),
    ],
)
def test_a_comparison_that_cannot_be_is_refused_in_one_sentence(
    flags: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert selection.main(["--out", str(tmp_path), *flags]) == 2
    told = capsys.readouterr().err
    assert word in told
    assert told.count("\n") == 1
    assert not any(path.is_dir() for path in tmp_path.iterdir())


def test_a_comparison_that_is_stopped_says_how_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise Stopped(signal.SIGTERM, "nothing was saved")

    monkeypatch.setattr(selection.command, "run", stopped)
    assert selection.main(["--out", str(tmp_path), "--policies", "ssdkd", "--seeds", "1", *SMALL]) == 2
    assert capsys.readouterr().err == "error: stopped; the same command goes on with the runs that are left.\n"


@pytest.mark.skipif(os.name != "posix", reason="locks")
def test_a_run_that_another_command_is_at_is_not_taken_for_one_that_was_cut_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running = RunFolder(tmp_path / "digits-ssdkd-seed0")
    running.path.mkdir()
    (running / selection.MARK).write_text("{}")
    with running.claimed():
        assert selection.main(["--out", str(tmp_path), "--policies", "ssdkd", "--seeds", "1", *SMALL]) == 2
    assert "digits-ssdkd-seed0 is being written by another run" in capsys.readouterr().err
    assert (running / selection.MARK).is_file()


def test_a_comparison_of_which_every_run_fails_says_so_and_has_no_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ruined(*_: Any, **__: Any) -> None:
        raise NumericalError("the loss is not finite")

    monkeypatch.setattr(selection.command, "run", ruined)
    assert selection.main(["--out", str(tmp_path), "--policies", "ssdkd", "--seeds", "1", *SMALL]) == 1
    assert "digits-ssdkd-seed0: the loss is not finite" in capsys.readouterr().out
    assert not (tmp_path / "selection.png").exists()


def test_a_runs_curve_begins_with_the_untrained_student_after_the_warm_up(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json("summary.json", {"phase_seconds": {"warmup": 1.5}, "student_accuracy": 61.0})
    folder.write_json(selection.MARK, {"accuracy_at_start": 9.0})
    lines = [
        {"round": 1, "progress": 0.4, "seconds": 3.0, "accuracy": 40.0, "probe_kl": None},
        {"round": 2, "progress": 0.7, "seconds": 4.0, "accuracy": None, "probe_kl": 2.0},
        {"round": 3, "progress": 1.0, "seconds": 5.0, "accuracy": 60.0, "probe_kl": 0.5},
    ]
    folder.write_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert selection.read(SimpleNamespace(task="t", policy="p", seed=3), folder) == Outcome(  # type: ignore[arg-type]
        *("t", "p", 3, [0.0, 0.4, 1.0], [1.5, 3.0, 5.0], [9.0, 40.0, 60.0], [math.inf, 0.5], 61.0)
    )


class NotedError(Exception):
    """What a policy was asked for."""


def test_every_run_has_its_seed_and_only_learned_policies_have_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(selection.DEFAULT)
    given = argparse.Namespace(
        **{"policies": ["random", "learned", "adaptive"], "policy_file": file, "ablate": True, "coefficients": None},
        **{"tasks": ["digits"], "teachers_root": None, "teacher": None, "data_root": None},
        **{"share": 1.0, "seeds": 2, "first_seed": 3},
    )
    jobs, left_out = selection.jobs_for(given, [])
    assert not left_out
    assert [(job.seed, job.config.seed) for job in jobs] == [(3, 3)] * (len(jobs) // 2) + [(4, 4)] * (len(jobs) // 2)
    assert len({job.folder(tmp_path) for job in jobs}) == len(jobs)
    for job in jobs:
        learned = job.policy != "random"
        assert (job.config.policy_file, bool(job.digest)) == (file if learned else None, learned)
        assert job.config.adapt == (job.policy == "adaptive")
    assert {"random", "learned", "adaptive", "without_effort", "without_feedback"} <= {job.policy for job in jobs}

    def noted(name: str, seed: int, *_: Any) -> None:
        raise NotedError(name, seed)

    monkeypatch.setattr(selection, "choose_policy", noted)
    asked = []
    for job in (job for job in jobs if job.policy in given.policies):
        with pytest.raises(NotedError) as error:
            selection.play(job, tmp_path)
        asked.append(error.value.args)
    assert asked == [(name, seed) for seed in (3, 4) for name in ("random", "learned", "learned")]


def test_coefficients_are_drawn_over_the_stretch_of_the_budget_in_which_they_held(tmp_path: Path) -> None:
    for seed, last in enumerate((0.25, 1.0)):
        folder = tmp_path / f"t-learned-seed{seed}"
        folder.mkdir()
        rounds = [(0.5, 4.0), (0.9, last), (1.0, last)]
        told = [{"round": n, "progress": end, "effort": effort} for n, (end, effort) in enumerate(rounds)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    (chart,) = selection.coefficient_charts(tmp_path, ["effort"])
    assert chart.lines[0].y == pytest.approx([1.0] * 50 + [-0.5] * 51), "their mean over the seeds, in action space"


def test_what_the_policy_set_is_drawn_for_any_number_of_tasks(tmp_path: Path) -> None:
    for task in range(15):
        folder = tmp_path / f"task{task}-learned-seed0"
        folder.mkdir()
        line = json.dumps({"round": 1, "progress": 1.0, "effort": 1.0})
        (folder / "metrics.jsonl").write_text(f"{line}\n" if task else "")
    (chart,) = selection.coefficient_charts(tmp_path, ["effort"])
    assert len(chart.lines) == 14 + 1, "a line for each task that was played, and neutral"


def test_a_task_may_be_a_variant_of_a_ready_made_job(tmp_path: Path) -> None:
    given = argparse.Namespace(teachers_root=None, data_root="data", teacher="lenet5.safetensors")
    config = selection.task_config("mnist-400", given, [])
    assert (config.dataset, config.teacher.name, config.buffer.capacity) == ("mnist", "lenet5", 400)
    assert config.tracking.evaluate_every == 1, "the curve needs every round"


def test_a_policy_that_goes_on_learning_is_compared_beside_the_one_it_begins_as(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards: list[float] = []
    monkeypatch.setattr(AdaptivePolicy, "learn", lambda self, reward, observation, ended: rewards.append(reward))
    flags = ["--out", str(tmp_path), "--policies", "learned", "adaptive", "--seeds", "1", *SMALL]
    assert list(selection.run(flags)["tasks"]["digits"]["policies"]) == ["learned", "adaptive"]
    learned, adaptive = (read_run(tmp_path / f"digits-{name}-seed0") for name in ("learned", "adaptive"))
    assert len(rewards) == len(adaptive.lines), "it is told what came of each of its rounds"
    assert learned.lines[0]["effort"] != adaptive.lines[0]["effort"], "it tries what it learns from"


def test_runs_may_be_given_a_share_of_their_rounds(tmp_path: Path) -> None:
    flags = ["--out", str(tmp_path), "--policies", "ssdkd", "--seeds", "1", *SMALL]
    whole = selection.run(flags)["runs"][0]
    part = selection.run([*flags, "--out", str(tmp_path / "less"), "--share", "0.6"])["runs"][0]
    assert [len(run["shares"]) - 1 for run in (whole, part)] == [3, 2], "1.8, rounded"
    engine = build_engine(build(RunConfig, [read_yaml(str(tmp_path / "digits-ssdkd-seed0" / "config.yaml"))]))
    assert whole["accuracy"][0] == engine.accuracy(engine.student), "the curve begins with the untrained student"


def test_a_finished_run_of_a_learned_policy_stands_for_that_policy_alone(tmp_path: Path) -> None:
    file = tmp_path / "p.safetensors"
    policy = load_policy()
    policy.save(file)
    flags = ["--out", str(tmp_path / "runs"), "--policies", "learned", "--policy-file", str(file), "--seeds", "1"]
    first = selection.run([*flags, *SMALL])["runs"]
    assert selection.run([*flags, *SMALL])["runs"] == first, "as it was, to the second"
    policy.mean[0] += 1.0
    policy.save(file)
    with pytest.raises(ConfigError, match="is a run with another learned policy"):
        selection.run([*flags, *SMALL])


@pytest.mark.parametrize("task", ["held-out-0", "held-out-7", "held-out-x"])
def test_a_held_out_task_that_is_none_is_refused(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "held_out_tasks", lambda _: [{}] * 6)
    given = argparse.Namespace(teachers_root=None, data_root=None, teacher=None)
    with pytest.raises(ConfigError, match=r"none of held-out-1, .*held-out-6"):
        selection.task_config(task, given, [])
    assert selection.task_config("held-out-6", given, []).dataset == "digits"


def test_a_task_is_compared_once_however_often_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "held_out_tasks", lambda _: [{}] * 2)
    named = selection.named_tasks(["held-out-2", "digits", "held-out", "digits", "held-out"], None)
    assert named == ["held-out-2", "digits", "held-out-1"]


def test_a_mistake_in_a_users_own_task_file_is_told_by_its_name(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(DIGITS_JOB.replace("rounds", "roundz"))
    given = argparse.Namespace(teachers_root=None, data_root=None, teacher=None)
    with pytest.raises(ConfigError, match=f"^unknown key roundz in {re.escape(str(job))}"):
        selection.task_config(str(job), given, [])


def test_a_users_own_task_file_is_left_as_it_is(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("# mine" + DIGITS_JOB)
    given = argparse.Namespace(teachers_root=None, data_root=None, teacher=None)
    before = job.read_text()
    assert selection.task_config(str(job), given, []).rounds == 7
    assert job.read_text() == before


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "digits-ssdkd-seed0" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    words = ["--out", str(tmp_path), "--policies", "ssdkd", "--seeds", "1", *SMALL]
    assert selection.main(words) == 2
    assert "in the way" in capsys.readouterr().err
    assert mine.read_text() == "mine"
    mine.rename(mine.parent / f".{selection.MARK}.0123abcd.tmp")  # of a run that was killed as it began
    assert selection.main(words) == 0


class Linear:
    """As much of a learned policy as an ablation asks for: every coefficient is what it sees of one entry."""

    mean = np.array([0.5, 0.25])

    def __init__(self, sees: str = "probe_agreement") -> None:
        self.description = SimpleNamespace(observations=["probe_kl", sees])
        self.place = [entry.name for entry in ENTRIES].index(sees)

    def predict(self, observation: Any, state: Any, *_: Any) -> tuple[np.ndarray, Any]:
        return np.repeat(np.asarray(observation)[..., self.place : self.place + 1], len(RANGES), axis=-1), state


def test_an_ablated_policy_lacks_one_part_and_no_other() -> None:
    seen = np.full(len(ENTRIES), 0.75)
    whole, _ = Linear().predict(seen, None)
    assert np.allclose(whole, 0.75)
    neutral = {r.name: r.to_unit(r.neutral) for r in RANGES}
    for lacks in ("effort", "refresh", "anneal"):
        held, _ = selection.Ablated(Linear(), lacks).predict(seen)  # type: ignore[arg-type]
        assert np.allclose(held, [neutral[lacks] if r.name == lacks else 0.75 for r in RANGES])
    known = dict.fromkeys(("progress", "making_share", "learning_rate"), 0.75)
    for entry, without in {"probe_agreement": 0.25, "novelty": 0.25, **known}.items():
        blind, _ = selection.Ablated(Linear(entry), "feedback").predict(seen)  # type: ignore[arg-type]
        assert np.allclose(blind, without), "the mean of training in place of what is seen, if no schedule knew it"
    assert np.allclose(seen, 0.75)


def test_units_compare_what_is_counted_with_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, in_force = torch.get_num_threads(), costs.STARTED
    built: list[Any] = []
    monkeypatch.setattr(units, "build_engine", lambda config: built.append(config.device) or build_engine(config))
    try:
        assert units.main(["--tasks", "digits", "--rounds", "1"]) == 0
        (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| digits")]
        in_seconds, *counted = (float(cell) for cell in row.strip("| ").split(" | ")[1:])
        assert in_seconds > 0
        assert built == ["cpu"], "a processor's seconds are of no GPU"
        assert counted == sorted(counted, reverse=True), "making is mostly multiply-adds here, a step mostly starting"
        assert in_force == costs.STARTED
        assert units.main(["--rounds", "0"]) == 2
        assert capsys.readouterr().err == "error: --rounds: at least 1.\n"
    finally:
        torch.set_num_threads(threads)
