"""Promises of tracking: what the event files say is what happened, and they never cost a run."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.util import tensor_util

import ssdkd
from ssdkd.build import build_engine
from ssdkd.coefficients import RANGES
from ssdkd.config import RunConfig, build, read_yaml
from ssdkd.data import LabelledImages
from ssdkd.engine import Engine
from ssdkd.run import main, run
from ssdkd.tracking import Display, RunFolder, events, tags, tensorboard
from ssdkd.tracking.events import EventWriter, Point
from ssdkd.tracking.metrics import read_metrics
from ssdkd.tracking.tags import GROUPS, TAGS, group_of

ROOT = Path(ssdkd.__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "tensorboard.md"
ROUNDS, EVERY = 12, 2
STEPS = [1, 2, 4, 6, 8, 10, 12]
PICTURE_STEPS = [1, 4, 8, 12]
SMALL = [
    *("--device", "cpu", "--inversion.images", "32", "--inversion.warmup", "2", "--inversion.steps", "2"),
    *("--inversion.width", "8", "--probe.images", "16", "--buffer.capacity", "64"),
    *("--distillation.batch", "32", "--distillation.steps", "3"),
    *("--policy", "ssdkd"),
]
TRACKED = [
    *("--tracking.every", str(EVERY), "--tracking.pictures_every", "4", "--tracking.evaluate_every", "4"),
]


def one_run(out: Path, *more: str, rounds: int = ROUNDS) -> Path:
    """Run the command in this process -> the folder that it made."""
    before = set(out.iterdir()) if out.is_dir() else set()
    assert main([*SMALL, "--rounds", str(rounds), "--out", str(out), "--quiet", *more]) == 0
    (made,) = set(out.iterdir()) - before
    return made


def read(folder: Path) -> EventAccumulator:
    """TensorBoard's own reader, keeping every point."""
    reader = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0, "histograms": 0, "images": 0})
    reader.Reload()
    return reader


def plugin_tags(reader: EventAccumulator, kind: str) -> set[str]:
    """The tags of a kind: scalars, histograms, images."""
    return set(reader.Tags()[kind])


def points(reader: EventAccumulator, tag: str) -> dict[int, Any]:
    """step -> number, histogram or picture; a doubled step is an error."""
    kind = next(kind for kind in ("scalars", "histograms", "images") if tag in reader.Tags()[kind])
    found: dict[int, Any] = {}
    for event in {"scalars": reader.Scalars, "histograms": reader.Histograms, "images": reader.Images}[kind](tag):
        assert event.step not in found, f"{tag} has two points at step {event.step}"
        content = {"scalars": "value", "histograms": "histogram_value"}.get(kind)
        found[event.step] = getattr(event, content) if content else event
    assert list(found) == sorted(found)
    return found


def metrics(folder: Path) -> dict[int, dict[str, float]]:
    return {int(line["round"]): line for line in read_metrics(folder / "metrics.jsonl")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return one_run(tmp_path_factory.mktemp("runs"), *TRACKED)


@pytest.fixture(scope="module")
def reader(folder: Path) -> EventAccumulator:
    return read(folder)


# -- the event files say what happened --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tag", "key", "scale"),
    [
        *((f"policy/{entry.name}", entry.name, 1.0) for entry in RANGES),
        ("policy/reward", "reward", 1.0),
        ("buffer/class_entropy", "class_entropy", 1.0),
        ("buffer/class_share_max_percent", "class_share_max", 100.0),
        ("buffer/confidence_median", "confidence_q50", 1.0),
        ("buffer/age_rounds_median", "age_q50", 1.0),
        ("spread/replays_per_image_q90", "visits_q90", 1.0),
        ("selection/effective_sample_size_percent", "replay_ess", 100.0),
        ("selection/replay_share_of_top_decile_percent", "replay_top_decile", 100.0),
        ("inversion/loss", "term_loss", 1.0),
        ("inversion/one_hot", "term_one_hot", 1.0),
        ("student/probe_kl_nats", "probe_kl", 1.0),
        ("student/probe_agreement_percent", "probe_agreement", 100.0),
        ("student/learning_rate", "learning_rate", 1.0),
    ],
)
def test_curves_are_those_of_the_metrics_file(
    folder: Path, reader: EventAccumulator, tag: str, key: str, scale: float
) -> None:
    found, lines = points(reader, tag), metrics(folder)
    assert list(found) == STEPS
    for step, value in found.items():
        assert value == pytest.approx(scale * lines[step][key], rel=1e-5, abs=1e-6)


def test_accuracy_is_shown_where_it_was_measured(folder: Path, reader: EventAccumulator) -> None:
    found = points(reader, "student/accuracy_percent")
    measured = {step: line["accuracy"] for step, line in metrics(folder).items() if "accuracy" in line}
    assert found == pytest.approx(measured, rel=1e-5)
    assert list(found) == [1, 4, 8, 12]


def test_the_reward_is_its_parts(reader: EventAccumulator) -> None:
    reward, fall, cost = (
        points(reader, f"policy/{name}") for name in ("reward", "reward_kl_fall_nats", "reward_cost_rounds")
    )
    for step in STEPS:
        assert fall[step] == pytest.approx(reward[step] * cost[step], rel=1e-4, abs=1e-7)
        assert cost[step] == pytest.approx(1.0, rel=1e-4)  # ssdkd plays rounds of effort 1
    kl = points(reader, "student/probe_kl_nats")
    assert fall[2] == pytest.approx(math.log(kl[1] / kl[2]), rel=1e-3, abs=1e-5)


def test_reference_lines_are_the_neutral_and_the_formula_values(reader: EventAccumulator) -> None:
    for entry in RANGES:
        for value in points(reader, f"reference/{entry.name}_neutral").values():
            assert value == pytest.approx(entry.neutral)
        chosen, formula = (points(reader, name) for name in (f"policy/{entry.name}", f"reference/{entry.name}_ssdkd"))
        for step in STEPS:  # the run's policy is ssdkd
            assert chosen[step] == pytest.approx(formula[step], rel=1e-4, abs=1e-5)


def test_every_tag_of_the_plan_is_written_and_no_other(reader: EventAccumulator) -> None:
    kinds = {"scalar": "scalars", "histogram": "histograms", "picture": "images"}
    written = {kind: plugin_tags(reader, plugin) for kind, plugin in kinds.items()}
    only_sometimes = {"time/gpu_memory_mib", "policy/{about}"}
    for kind, names in written.items():
        planned = [tag.name for tag in TAGS if tag.kind == kind]
        patterns = [re.compile(re.sub(r"\\{\w+\\}", r"\\w+", re.escape(name))) for name in planned]
        for name in names:
            assert any(pattern.fullmatch(name) for pattern in patterns), name
        for name, pattern in zip(planned, patterns, strict=True):
            assert name in only_sometimes or any(pattern.fullmatch(n) for n in names), name
    assert {group_of(tag) for tag in TAGS} == set(GROUPS)


def test_histograms_count_the_whole_buffer(reader: EventAccumulator) -> None:
    for tag in plugin_tags(reader, "histograms"):
        found = points(reader, tag)
        assert list(found) == PICTURE_STEPS
        assert all(sum(histogram.bucket) == histogram.num == 64 for histogram in found.values())
    shares = points(reader, "buffer/replay_probability_times_mean")[ROUNDS]
    assert shares.sum / shares.num == pytest.approx(1.0, rel=1e-5)


def test_pictures_can_be_opened(reader: EventAccumulator) -> None:
    for tag in plugin_tags(reader, "images"):
        found = points(reader, tag)
        assert list(found) == PICTURE_STEPS
        last = found[ROUNDS]
        picture = Image.open(io.BytesIO(last.encoded_image_string))
        assert picture.size == (last.width, last.height)
        assert np.asarray(picture).std() > 1.0


def test_tags_explain_themselves_in_tensorboard(reader: EventAccumulator) -> None:
    about = reader.SummaryMetadata("policy/alpha").summary_description
    assert "replay follows disagreement" in about
    assert "KL" in reader.SummaryMetadata("selection/what_if_replayed_by_kl").summary_description
    (plan,) = reader.Tensors("plan")
    words = tensor_util.make_ndarray(plan.tensor_proto).item().decode()
    assert all(f"`{tag.name}`" in words for tag in TAGS)


def test_the_layout_puts_each_coefficient_beside_its_references(reader: EventAccumulator) -> None:
    (event,) = reader.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(tensor_util.make_ndarray(event.tensor_proto).item())
    charts = {chart.title: chart for category in layout.category for chart in category.chart}
    written = plugin_tags(reader, "scalars")
    for entry in RANGES:
        shown = list(charts[entry.name].multiline.tag)
        names = [f"policy/{entry.name}", f"reference/{entry.name}_neutral", f"reference/{entry.name}_ssdkd"]
        assert [[name for name in written if re.match(pattern, name)] for pattern in shown] == [[n] for n in names]
    bands = [series for chart in charts.values() for series in chart.margin.series]
    assert len(bands) == 4
    assert {name for band in bands for name in (band.lower, band.value, band.upper)} <= written


def test_hparams_hold_the_settings_and_how_it_went(folder: Path, reader: EventAccumulator) -> None:
    content = reader.PluginTagToContent("hparams")
    start = hparams_metadata.parse_session_start_info_plugin_data(content["_hparams_/session_start_info"])
    assert start.hparams["policy"].string_value == "ssdkd"
    assert start.hparams["buffer.capacity"].number_value == 64
    assert not [name for name in start.hparams if name.startswith(("tracking", "checkpoint", "data_root", "out"))]
    assert "_hparams_/session_end_info" in content
    summary = json.loads((folder / "summary.json").read_text())
    (accuracy,) = points(reader, "final/student_accuracy_percent").values()
    assert accuracy == pytest.approx(summary["student_accuracy"], rel=1e-5)


def test_a_policy_may_tell_what_it_thinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "agents.fixed.SchedulePolicy.diagnostics", lambda self, observation: {"value_estimate": 3.5}, raising=False
    )
    found = points(read(one_run(tmp_path, rounds=2)), "policy/value_estimate")
    assert found == {1: 3.5, 2: 3.5}


# -- what is asked for --------------------------------------------------------------------------------------


def test_pictures_can_be_left_out(tmp_path: Path) -> None:
    reader = read(one_run(tmp_path, "--tracking.images", "off", rounds=2))
    assert not plugin_tags(reader, "images")
    assert plugin_tags(reader, "histograms")


def test_all_of_it_can_be_left_out(tmp_path: Path) -> None:
    made = one_run(tmp_path, "--tracking.tensorboard", "off", "--tracking.report", "off", rounds=2)
    assert {path.name for path in made.iterdir()} == {"config.yaml", "metrics.jsonl", "summary.json"} | {
        path.name for path in made.iterdir() if path.name in ("student.safetensors", "buffer.png", "checkpoints")
    }


def test_watching_changes_nothing(tmp_path: Path) -> None:
    watched = one_run(tmp_path, *TRACKED, "--tracking.every", "1", rounds=4)
    alone = one_run(tmp_path, "--tracking.tensorboard", "off", rounds=4)
    assert (watched / "student.safetensors").read_bytes() == (alone / "student.safetensors").read_bytes()


def test_no_evaluation_image_is_written(tmp_path: Path) -> None:
    def pictures_of(name: str, replace: bool) -> tuple[dict[str, Any], bytes]:
        config = build(
            RunConfig, [read_yaml("digits"), ({"rounds": 2, "policy": "ssdkd", "buffer": {"capacity": 64}}, "the test")]
        )
        config.inversion.images, config.inversion.warmup, config.device = 32, 2, "cpu"
        config.tracking.evaluate_every = 1
        engine: Engine = build_engine(config)
        assert engine.evaluation is not None
        if replace:
            noise = torch.randint(0, 256, engine.evaluation.images.shape, dtype=torch.uint8)
            engine.evaluation = LabelledImages(noise, engine.evaluation.labels, engine.evaluation.spec)
        folder = RunFolder.create(tmp_path, name)
        folder.write_text("config.yaml", "")
        run(config, engine, folder, Display(quiet=True))
        reader = read(folder.path)
        shown = {tag: points(reader, tag)[2].encoded_image_string for tag in plugin_tags(reader, "images")}
        return shown, (folder / "replays.png").read_bytes()

    assert pictures_of("real", replace=False) == pictures_of("noise", replace=True)


# -- kills, resumes and broken disks --------------------------------------------------------------------------


def test_a_killed_run_can_be_read_and_its_curves_go_on(tmp_path: Path) -> None:
    rounds = 30
    command = [sys.executable, "-m", "ssdkd.run", *SMALL, "--tracking.every", "1", "--tracking.pictures_every", "5"]
    command += ["--checkpoint.rounds", "7", "--out", str(tmp_path), "--quiet", "--rounds", str(rounds)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        made = [path for path in tmp_path.glob("digits-*/metrics.jsonl") if path.read_text().count("\n") >= 10]
        if made:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    process.wait(timeout=60)
    folder = next(tmp_path.glob("digits-*"))
    before = points(read(folder), "student/probe_kl_nats")
    assert list(before) == list(range(1, len(before) + 1))
    assert len(before) >= 9
    (written,) = folder.glob("events.out.tfevents.*")
    with written.open("r+b") as stream:  # as if the kill had come in the middle of a record
        stream.truncate(written.stat().st_size - 5)
    assert main(["--resume", str(folder), "--quiet"]) == 0
    reader = read(folder)
    lines = metrics(folder)
    assert len(list(folder.glob("events.out.tfevents.*"))) == 2
    for tag, key in (("student/probe_kl_nats", "probe_kl"), ("policy/beta", "beta"), ("inversion/loss", "term_loss")):
        found = points(reader, tag)
        assert list(found) == list(range(1, rounds + 1))
        for step, value in found.items():
            assert value == pytest.approx(lines[step][key], rel=1e-5, abs=1e-6)
    server = plugin_event_accumulator.EventAccumulator(str(folder))
    server.Reload()
    assert [event.step for event in server.Tensors("policy/beta")] == list(range(1, rounds + 1))
    assert list(points(reader, "buffer/images")) == [1, 5, 10, 15, 20, 25, 30]


def test_a_full_disk_ends_the_tracking_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = events._append
    calls = []

    def fails_later(stream: Any, event: Any) -> None:
        calls.append(event)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        write(stream, event)

    monkeypatch.setattr(events, "_append", fails_later)
    made = one_run(tmp_path, *TRACKED)
    assert len(calls) == 6
    said = capsys.readouterr().err
    assert said.count("TensorBoard") == 1
    assert "No space left on device" in said
    assert (made / "student.safetensors").is_file()
    assert len(metrics(made)) == ROUNDS


def test_a_mistake_in_the_plan_ends_the_tracking_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tensorboard, "histograms", lambda *_: 1 / 0)
    made = one_run(tmp_path, rounds=2)
    assert "division by zero" in capsys.readouterr().err
    assert (made / "summary.json").is_file()


def test_a_deleted_folder_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    folder = tmp_path / "run"
    folder.mkdir()
    writer = EventWriter(folder, said.append)
    writer.add(Point({"a/b": 1.0}), 1)
    shutil.rmtree(folder)
    for step in (2, 3, 4):
        writer.add(Point({"a/b": 1.0}), step)
    assert len(said) == 1
    assert not writer.active
    assert not folder.exists()


def test_a_writer_goes_on_after_the_step_it_is_given(tmp_path: Path) -> None:
    for after, last in ((0, 9), (5, 7)):
        writer = EventWriter(tmp_path, pytest.fail, after=after)
        for step in range(after + 1, last + 1):
            writer.add(Point({"a/b": float(100 * after + step)}), step)
        writer.close()
    found = points(read(tmp_path), "a/b")
    server = plugin_event_accumulator.EventAccumulator(str(tmp_path))  # what the server uses where it has no faster one
    server.Reload()
    assert [event.step for event in server.Tensors("a/b")] == list(found)
    assert found == {
        **{step: step for step in range(1, 6)},
        **{step: 500.0 + step for step in (6, 7)},
    }


def test_values_that_are_not_finite_spoil_nothing(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path, pytest.fail)
    strange = np.array([1.0, np.nan, np.inf, 2.0])
    writer.add(Point({"a/nan": math.nan}, {"a/some": strange, "a/none": strange[1:2], "a/same": np.ones(3)}), 1)
    reader = read(tmp_path)
    assert math.isnan(float(points(reader, "a/nan")[1]))
    assert points(reader, "a/some")[1].num == 2
    assert points(reader, "a/none")[1].num == 0
    assert points(reader, "a/same")[1].num == 3


# -- the documentation ----------------------------------------------------------------------------------------


def test_the_page_lists_the_plan() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for table in tags.tables().strip().split("\n\n### "):
        assert table in page, "paste what `python -m ssdkd.tracking.tags` prints into docs/tensorboard.md"
    of_runs, _, _ = page.partition("\n## Training a policy\n")
    listed = re.findall(r"^\| `(\w+/[\w{}]+)` \|", of_runs, re.MULTILINE)
    assert listed == [tag.name for group in GROUPS for tag in TAGS if group_of(tag) == group]


def test_the_page_shows_a_picture_of_each_group() -> None:
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", PAGE.read_text(encoding="utf-8"))
    assert len(shown) >= 7
    for name in shown:
        path = PAGE.parent / name
        assert path.stat().st_size < 150_000, name
        Image.open(path).verify()
