"""Promises of the report: one file that opens without a network, tells what happened, and compares runs."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ssdkd import report
from ssdkd.buffer import ReplayBuffer, Samples
from ssdkd.coefficients import RANGES
from ssdkd.run import main as run_main
from ssdkd.tracking.charts import Chart, Line, brief, ticks, to_pixels, to_svg
from ssdkd.tracking.pictures import buffer_grid, replay_grid
from ssdkd.tracking.whatif import what_if

SMALL = [
    *("--rounds", "4", "--device", "cpu", "--inversion.images", "32", "--inversion.warmup", "2"),
    *("--inversion.steps", "2", "--inversion.width", "8", "--probe.images", "16", "--buffer.capacity", "64"),
    *("--distillation.batch", "32", "--distillation.steps", "3", "--tracking.evaluate_every", "2"),
    *("--policy", "ssdkd"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two policies, one of them with two seeds."""
    out = tmp_path_factory.mktemp("runs")
    for policy, seed in (("ssdkd", 0), ("ssdkd", 1), ("uniform", 0)):
        options = [*SMALL, "--out", str(out), "--quiet", "--policy", policy, "--seed", str(seed)]
        assert run_main(options) == 0
    return {re.sub(r"^digits-(.*?)-\d{8}.*", r"\1", path.name): path for path in out.iterdir()}


def text_of(page: str) -> str:
    return re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_of_any_number_of_channels_are_shown(channels: int) -> None:
    buffer = ReplayBuffer(2, (channels, 4, 4), 2, 1, torch.device("cpu"))
    images = torch.full((2, 4, 4, channels), 200, dtype=torch.uint8)
    views, logits = torch.zeros((2, 1, 3), dtype=torch.int16), torch.zeros(2, 1, 2)
    buffer.append(Samples(images, views, logits, torch.tensor([0, 1]), torch.ones(2)), delta=1.0, round_index=0)
    for sheet in (replay_grid(buffer, 2), buffer_grid(buffer.filled(), 2)):
        assert sheet.shape[2] == 3
        assert (sheet == 200).all(axis=2).any()


def pictures_of(page: str) -> list[Image.Image]:
    packed = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in packed]


def test_a_run_ends_with_its_report(runs: dict[str, Path]) -> None:
    page = (runs["ssdkd-seed0"] / "report.html").read_text(encoding="utf-8")
    summary = json.loads((runs["ssdkd-seed0"] / "summary.json").read_text())
    words = text_of(page)
    assert f"{summary['student_accuracy']:.2f} %" in words
    assert f"of {summary['synthesized_images']:,} made" in words
    for entry in RANGES:
        assert f'aria-label="{entry.name}"' in page
        assert entry.steers in page.replace("&#x27;", "'")
    (picture,) = pictures_of(page)
    assert np.asarray(picture).shape[2] == 3


def test_the_picture_is_called_what_it_is_and_left_out_where_no_pictures_are_wanted(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    page = (runs["ssdkd-seed0"] / "report.html").read_text(encoding="utf-8")
    assert "up to the twentieth, from the most to the least replayed" in page
    for option, shown in (("--tracking.report", 1), ("--tracking.images", 0)):
        out = tmp_path / option
        assert run_main([*SMALL, "--out", str(out), "--quiet", option, "off"]) == 0
        (run,) = out.iterdir()
        assert not (run / "replays.png").exists()
        assert report.main([str(run)]) == 0
        page = (run / "report.html").read_text(encoding="utf-8")
        assert len(pictures_of(page)) == shown
        assert "replayed; the count" not in page, "buffer.png, which is there, goes by confidence"


@pytest.mark.parametrize("names", [["ssdkd-seed0"], ["ssdkd-seed0", "ssdkd-seed1", "uniform-seed0"]])
def test_the_page_needs_nothing_from_elsewhere(runs: dict[str, Path], tmp_path: Path, names: list[str]) -> None:
    report.write_report([runs[name] for name in names], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "http" not in page
    assert "<script" not in page
    assert "<link" not in page
    assert all(source.startswith("data:") for source in re.findall(r'src="([^"]+)"', page))
    assert 'name="viewport"' in page
    for drawing in re.findall(r"<svg.*?</svg>", page):
        ElementTree.fromstring(drawing)


def test_several_runs_are_compared(runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "comparison.html"
    assert report.main([*(str(path) for path in runs.values()), "--out", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    words = text_of(page)
    for path in runs.values():
        accuracy = json.loads((path / "summary.json").read_text())["student_accuracy"]
        assert path.name in words
        assert f"{accuracy:.2f}" in words
    two = [json.loads((runs[f"ssdkd-seed{s}"] / "summary.json").read_text())["student_accuracy"] for s in (0, 1)]
    mean = re.search(r'<tr class="mean">.*?</tr>', page)
    assert mean is not None
    assert f"<td>{sum(two) / 2:.2f}</td>" in mean.group()
    assert len(pictures_of(page)) == 2  # one of each policy
    assert re.search(r"<td>policy</td>(<td>\w+</td>){3}", page)  # settings that differ


def test_settings_that_differ_are_written_as_in_the_configuration(runs: dict[str, Path], tmp_path: Path) -> None:
    for name, given in (("open", "null"), ("given", "true")):
        shutil.copytree(runs["ssdkd-seed0"], tmp_path / name)
        config = tmp_path / name / "config.yaml"
        text, count = re.subn("rendered: .*", f"rendered: {given}", config.read_text())
        assert count == 1
        config.write_text(text)
    out = tmp_path / "comparison.html"
    assert report.main([str(tmp_path / "open"), str(tmp_path / "given"), "--out", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    assert "<td>buffer.rendered</td><td>null</td><td>true</td>" in page
    assert "rendered null" in text_of(page)


def test_runs_of_one_policy_are_called_by_what_tells_them_apart(runs: dict[str, Path], tmp_path: Path) -> None:
    folders = []
    for teacher, rate in (("wide", 0.1), ("wide", 0.2), ("deep", 0.1)):
        folders.append(tmp_path / f"{teacher}-{rate}")
        shutil.copytree(runs["ssdkd-seed0"], folders[-1])
        config = yaml.safe_load((folders[-1] / "config.yaml").read_text())
        config["teacher"] |= {"name": teacher, "checkpoint": f"/weights/{teacher}.pth"}
        config["distillation"]["learning_rate"] = rate
        (folders[-1] / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    called = [curve.label for curve in report._grouped([report.read_run(folder) for folder in folders])]
    assert called == [
        "teacher wide, learning_rate 0.1",
        "teacher wide, learning_rate 0.2",
        "teacher deep, learning_rate 0.1",
    ]
    short = [curve.label for curve in report._grouped([report.read_run(folders[i]) for i in (0, 2)])]
    assert short == ["teacher wide", "teacher deep"], "no more than it takes, and no path"


def test_runs_on_other_data_are_no_repetitions(runs: dict[str, Path], tmp_path: Path) -> None:
    folders = [*runs.values()]
    for name in ("ssdkd-seed0", "uniform-seed0"):
        folders.append(tmp_path / name)
        shutil.copytree(runs[name], folders[-1])
        config = yaml.safe_load((folders[-1] / "config.yaml").read_text())
        (folders[-1] / "config.yaml").write_text(yaml.safe_dump(config | {"dataset": "mnist"}, sort_keys=False))
    grouped = report._grouped([report.read_run(folder) for folder in folders])
    sizes = {curve.label: len(curve.runs) for curve in grouped}
    assert sizes == {"ssdkd, digits": 2, "uniform, digits": 1, "ssdkd, mnist": 1, "uniform, mnist": 1}
    assert len({curve.colour for curve in grouped}) == 4


@pytest.mark.parametrize(
    ("key", "values", "called"),
    [
        ("rounds", (4, 400), ["ssdkd, rounds 4", "ssdkd, rounds 400", "uniform, rounds 4"]),
        ("policy_file", ("a/of", "b/of"), ["ssdkd, policy_file of", "ssdkd, policy_file of", "uniform, policy_file"]),
        ("threads", (1, 4), ["ssdkd", "uniform"]),
    ],
)
def test_runs_with_other_settings_are_no_repetitions(
    runs: dict[str, Path], tmp_path: Path, key: str, values: tuple[Any, Any], called: list[str]
) -> None:
    folders = [tmp_path / "a", tmp_path / "b", runs["uniform-seed0"]]
    for seed, (folder, value) in enumerate(zip(folders, values, strict=False)):
        shutil.copytree(runs[f"ssdkd-seed{seed}"], folder)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        (folder / "config.yaml").write_text(yaml.safe_dump(config | {key: value}, sort_keys=False))
    grouped = report._grouped([report.read_run(folder) for folder in folders])
    assert [curve.label.removesuffix(" null") for curve in grouped] == called
    assert len({curve.colour for curve in grouped}) == len(called)


def test_a_run_half_way_is_not_in_the_mean(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["ssdkd-seed1"], tmp_path / "killed")
    (tmp_path / "killed" / "summary.json").unlink()
    finished, killed, other = runs["ssdkd-seed0"], tmp_path / "killed", runs["uniform-seed0"]
    page = report.report([report.read_run(folder) for folder in (finished, killed, other)])
    assert "(not finished)" in page
    assert 'class="mean"' not in page
    page = report.report([report.read_run(folder) for folder in (finished, runs["ssdkd-seed1"], killed, other)])
    two = [json.loads((runs[f"ssdkd-seed{s}"] / "summary.json").read_text())["seconds"] for s in (0, 1)]
    mean = re.search(r'<tr class="mean">.*?</tr>', page)
    assert mean is not None
    assert f"<td>{sum(two) / 2:.1f}</td>" in mean.group()


def test_a_run_that_was_killed_has_a_report_too(runs: dict[str, Path], tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    killed.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        (killed / name).write_bytes((runs["uniform-seed0"] / name).read_bytes())
    assert report.main([str(killed)]) == 0
    assert "not come to its end" in (killed / "report.html").read_text(encoding="utf-8")


def test_the_curve_of_accuracy_ends_with_the_student_handed_out(runs: dict[str, Path], tmp_path: Path) -> None:
    summary = json.loads((runs["ssdkd-seed0"] / "summary.json").read_text())
    lines = [json.loads(line) for line in (runs["ssdkd-seed0"] / "metrics.jsonl").read_text().splitlines()]
    lines[-1].pop("accuracy", None)
    for name in ("config.yaml", "summary.json"):
        (tmp_path / name).write_bytes((runs["ssdkd-seed0"] / name).read_bytes())
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    assert report.read_run(tmp_path).last["accuracy"] == summary["student_accuracy"]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines[:-1]))
    assert report.read_run(tmp_path).last.get("accuracy") == lines[-2].get("accuracy"), "not of that round"
    for line in lines:
        line.pop("accuracy", None)
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    assert "accuracy" not in report.read_run(tmp_path).last, "one point is no curve"


def test_a_run_of_before_there_was_a_coefficient_has_a_report(runs: dict[str, Path], tmp_path: Path) -> None:
    before = tmp_path / "before"
    before.mkdir()
    (before / "config.yaml").write_bytes((runs["ssdkd-seed0"] / "config.yaml").read_bytes())
    lines = [json.loads(line) for line in (runs["ssdkd-seed0"] / "metrics.jsonl").read_text().splitlines()]
    fewer = [{key: value for key, value in line.items() if key != "wear"} for line in lines]
    assert fewer != lines
    (before / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in fewer))
    assert report.main([str(before)]) == 0
    assert "Kept by times replayed" in (before / "report.html").read_text(encoding="utf-8")
    fewer = [{key: value for key, value in line.items() if key != "visits_q50"} for line in lines]
    (before / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in fewer))
    assert report.main([str(before)]) == 0
    assert "Kept by times replayed" not in (before / "report.html").read_text(encoding="utf-8")


def test_what_has_no_value_leaves_a_gap(runs: dict[str, Path], tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "config.yaml").write_bytes((runs["ssdkd-seed0"] / "config.yaml").read_bytes())
    lines = (runs["ssdkd-seed0"] / "metrics.jsonl").read_text().splitlines()
    broken = json.loads(lines[2]) | {"probe_kl": None, "delta_q50": None, "progress": None}
    (odd / "metrics.jsonl").write_text("\n".join([*lines[:2], json.dumps(broken)]))
    assert report.main([str(odd)]) == 0
    assert "nan" not in (odd / "report.html").read_text(encoding="utf-8").lower().replace("nanosec", "")


@pytest.mark.parametrize("words", [[], ["run", "--to", "file"]])
def test_a_mistake_on_the_command_line_is_one_sentence(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: None, "not a run folder"),
        (lambda folder: (folder / "config.yaml").write_text("a: [\n"), "config.yaml, line 2 cannot be read as YAML"),
        (
            lambda folder: (folder / "config.yaml").write_text("policy: ssdkd\n"),
            "metrics.jsonl cannot be read: No such file or directory.",
        ),
        (
            lambda folder: [(folder / n).write_text("") for n in ("config.yaml", "metrics.jsonl")],
            "holds no round yet",
        ),
    ],
)
def test_a_folder_that_is_no_run_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: object, says: str
) -> None:
    make(tmp_path)  # type: ignore[operator]
    assert report.main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert str(tmp_path) in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("over", "named"),
    [
        ({"student_accuracy": "x"}, "student_accuracy"),
        ({"teacher_accuracy": None}, "teacher_accuracy"),
        ({"phase_seconds": [1, 2]}, "phase_seconds"),
    ],
)
def test_a_summary_with_what_is_no_number_is_refused_in_one_sentence(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], over: dict[str, Any], named: str
) -> None:
    shutil.copytree(runs["ssdkd-seed0"], tmp_path / "run")
    summary = tmp_path / "run" / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | over))
    assert report.main([str(tmp_path / "run")]) == 2
    assert f"summary.json has no number for {named}: " in capsys.readouterr().err


def test_a_line_that_is_not_of_numbers_is_left_out(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["ssdkd-seed0"], tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"round": 99, "probe_kl": "x"}\n')
    assert report.main([str(tmp_path / "run")]) == 0
    assert report.read_run(tmp_path / "run").last["round"] < 99


def test_a_summary_that_lacks_what_is_told_is_named(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / name).write_bytes((runs["ssdkd-seed0"] / name).read_bytes())
    (tmp_path / "summary.json").write_text('{"rounds": 1}')
    for words in ([str(tmp_path)], [str(tmp_path), str(runs["uniform-seed0"])]):
        assert report.main([*words, "--out", str(tmp_path / "page.html")]) == 2
        assert "summary.json has no number for teacher_parameters" in capsys.readouterr().err
    for damaged in ('{"rounds"', "[]"):
        (tmp_path / "summary.json").write_text(damaged)
        assert report.main([str(tmp_path)]) == 2
        assert "delete it and go on with the run" in capsys.readouterr().err


def test_names_cannot_smuggle_in_markup(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "<b>run&"
    folder.mkdir()
    (folder / "config.yaml").write_text("policy: '<img src=x>'\nseed: '<img src=y>'\ndataset: '<img src=z>'\n")
    (folder / "metrics.jsonl").write_bytes((runs["ssdkd-seed0"] / "metrics.jsonl").read_bytes())
    smuggled, other = report.read_run(folder), report.read_run(runs["uniform-seed0"])
    for compared in ([smuggled], [smuggled, other]):
        page = report.report(compared)
        assert not re.search("<img src=[xyz]>", page)
        assert "<b>run&" not in page
        assert "&lt;b&gt;run&amp;" in page


# -- charts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0.0, 10.0, False, [0, 2, 4, 6, 8, 10]),
        (-0.4, 0.6, False, [-0.4, -0.2, 0, 0.2, 0.4, 0.6]),
        (0.01, 100.0, True, [0.01, 0.1, 1, 10, 100]),
        (0.5, 4.0, True, [0.5, 1, 2]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, log: bool, expected: list[float]) -> None:
    assert ticks(low, high, log, 5) == pytest.approx(expected)


def test_numbers_are_brief() -> None:
    shown = [brief(v) for v in (0.0, 0.00012, 0.25, 12.0, 12_000.0, 3_400_000.0)]
    assert shown == ["0", "1.2e-4", "0.25", "12", "12k", "3.4M"]


def test_a_curve_keeps_its_gaps_and_its_place() -> None:
    chart = Chart("t", "x", [Line("", [0, 1, 2, 3], [0.0, 1.0, float("nan"), 1.0])], y_range=(0.0, 1.0))
    drawing = ElementTree.fromstring(to_svg(chart, 200, 100))
    pieces = [line.attrib["points"].split(" ") for line in drawing.iter("polyline")]
    assert [len(piece) for piece in pieces] == [2, 2]  # the last is a point, drawn as a dot
    (x0, y0), (x1, y1) = (tuple(map(float, point.split(","))) for point in pieces[0])
    assert x1 > x0
    assert y1 < y0  # larger values are higher up


def test_a_legend_names_all_that_is_compared_in_as_many_rows_as_it_takes() -> None:
    tasks = ["digits", *(f"held-out-{n}" for n in range(1, 7)), "mnist", "mnist-400"]

    def drawn(names: list[str]) -> tuple[set[float], float]:
        """Where the legend's rows are, and where the plot begins."""
        chart = Chart("t", "x", [Line(name, [0, 1], [0.0, 1.0]) for name in names], y_range=(0.0, 2.0))
        texts = ElementTree.fromstring(to_svg(chart, 480, 300)).iter("text")
        height_of = {text.text: float(text.get("y", 0)) for text in texts}
        return {height_of[name] for name in names}, height_of["2"]

    (one_row, begins), (rows, begins_lower) = drawn(tasks[:3]), drawn(tasks)
    assert len(one_row) == 1
    assert len(rows) == 2
    assert max(rows) < begins_lower
    assert begins < begins_lower


def test_both_drawings_show_the_same_curve() -> None:
    chart = Chart("t", "x", [Line("", [0, 1], [0.0, 1.0], "#ff0000", width=3.0)])
    pixels = to_pixels([chart, chart], columns=2, width=200, height=120)
    assert pixels.shape == (120, 400, 3)
    red = (pixels[..., 0] > 200) & (pixels[..., 1] < 80)
    assert red[:, :200].sum() == red[:, 200:].sum() > 100
    rows, columns = np.nonzero(red[:, :200])
    assert np.corrcoef(rows, columns)[0, 1] < -0.95  # rising to the right


def test_what_if_follows_the_two_functions() -> None:
    middles = {"confidence": 0.5, "delta": 1.0, "visits": 7.0}
    statistics = {f"{key}_q{q}": value for key, value in middles.items() for q in (10, 50, 90)}
    coefficients = {"w_div": 1.0, "gamma": 2.0, "wear": 0.5, "alpha": 0.5, "eta": 1.0, "beta": 1.0}
    charts = {chart.title: chart for chart in what_if({**statistics, "progress": 0.0}, coefficients)}

    def at(title: str, x: float) -> float:
        line = next(line for line in charts[title].lines if line.label == "now")
        return float(np.exp(np.interp(np.log(x), np.log(line.x), np.log(line.y))))

    assert at("Kept: phi by class size", 2.0) == pytest.approx(0.5, rel=0.01)
    assert at("Kept: phi by confidence", 0.75) == pytest.approx(0.25, rel=0.05)
    assert at("Kept by times replayed", 15.0) == pytest.approx(0.5**0.5, rel=0.01)
    assert at("Replayed: P by KL", 4.0) == pytest.approx(2.0, rel=0.01)
    assert at("Weight in the loss by KL", 4.0) == pytest.approx(0.5, rel=0.01)
    assert at("Replayed: P by class size", 2.0) == pytest.approx(0.5, rel=0.01)
    neutral = next(line for line in charts["Replayed: P by KL"].lines if line.label == "neutral")
    assert neutral.y == pytest.approx([1.0] * len(neutral.y))
