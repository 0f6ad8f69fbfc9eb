"""Promise of the engine: on a device nothing is on the wrong side, and a round waits for the device once."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import backend_registration

from ssdkd.checkpoint import load_newest, save
from ssdkd.config import RunConfig, from_mapping
from ssdkd.costs import Costs
from ssdkd.data import ImageSpec, dataset_spec, load_dataset
from ssdkd.engine import Engine, Statistics
from ssdkd.inversion.observer import _Moments
from ssdkd.models import create_model, load_weights, save_weights
from ssdkd.run import run
from ssdkd.teacher import TeacherTraining, train
from ssdkd.tracking import Display, RunFolder
from tests.pretended_device import pretended_device, waits
from tests.test_engine import STEERED, changed, digits_teacher, seeded, small_student

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch cannot pretend a device",
)

TEXTURES = {"start": "textures", "textures": 0.5}
COLOURS = ImageSpec(3, 16, 16, 4, (0.5,) * 3, (0.25,) * 3, True, ("a", "b", "c", "d"))


def engine_on(device: torch.device, kind: str) -> Engine:
    teacher, student, spec, options = digits_teacher(), small_student(), dataset_spec("digits"), changed()
    if kind == "textures":
        student, options = small_student(batch_norm=False), changed(inversion=TEXTURES)
    if kind == "pyramid":
        teacher, student = (seeded(coloured, seed) for seed in (1, 2))
        spec, options = COLOURS, changed(inversion={"blends": 0.5}, distillation={"optimizer": "muon"})
    if kind == "asked anew":
        options = changed(buffer={"views": 0, "border": "black"}, distillation={"average": 0.0})
    if kind == "fresh":
        options = changed(buffer={"fresh": True, "capacity": 32})
    return Engine(teacher, student, spec, from_mapping(RunConfig, {**options, "rounds": 8}), device)


def coloured() -> nn.Module:
    return create_model("convnet", num_classes=4, in_channels=3, image_size=16, widths=[8, 12])


KINDS = ("generator", "textures", "pyramid", "asked anew", "fresh")


@pytest.fixture(scope="module")
def apart() -> Iterator[Callable[..., Any]]:
    """Calls a function in another process: PyTorch never forgets a device that it was told of."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        yield lambda function, *arguments: process.submit(function, *arguments).result()


def rounds_on_the_device(kind: str) -> list[tuple[bool, list[str], Statistics]]:
    """Of five rounds: whether the buffer was full before, what waited, and the facts."""
    with pretended_device() as device:
        engine = engine_on(device, kind)
        loop = engine.loop()
        next(loop)
        rounds = []
        for _ in range(5):
            full = engine.buffer.size == engine.buffer.capacity
            waits.clear()
            statistics = loop.send(STEERED)
            rounds.append((full, list(waits), statistics))
        assert all(weight.device == device for weight in engine.student.parameters())
        return rounds


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_waits_for_the_device_once(kind: str, apart: Callable[..., Any]) -> None:
    rounds = apart(rounds_on_the_device, kind)
    assert rounds[-1][0]
    for full, waited, _ in rounds:
        has_room = not full or kind == "fresh"  # then how many samples are usable has to be known
        assert waited == (["aten::nonzero", "tolist"] if has_room else ["tolist"])

    loop = engine_on(torch.device("cpu"), kind).loop()
    next(loop)
    first = loop.send(STEERED)
    for name in ("replay_loss", "candidate_confidence_q50", "accepted"):
        assert rounds[0][2][name] == pytest.approx(first[name], rel=0.1)


def statistics_and_slope(on_device: bool) -> list[Tensor]:
    """Of maps with three channels: mean and variance of each, and the derivative of a sum of theirs."""
    maps = torch.linspace(-1.0, 2.0, 2 * 3 * 4 * 5).square().view(2, 3, 4, 5)
    factors = torch.tensor([[1.0, -2.0, 3.0], [0.5, 4.0, -1.0]])
    with pretended_device() if on_device else nullcontext(torch.device("cpu")) as device:
        seen = maps.to(device).contiguous(memory_format=torch.channels_last).requires_grad_(True)
        found = torch.stack(_Moments.apply(seen))
        (slope,) = torch.autograd.grad((found * factors.to(device)).sum(), seen)
        return [found.detach().cpu(), slope.cpu()]


def test_statistics_are_those_of_a_cpu(apart: Callable[..., Any]) -> None:
    """A GPU works them out in another way."""
    for there, here in zip(apart(statistics_and_slope, True), statistics_and_slope(False), strict=True):
        torch.testing.assert_close(there, here)


def costs_on_the_device() -> Costs:
    with pretended_device() as device:
        return engine_on(device, "pyramid").costs


def test_a_budget_means_the_same_on_a_device(apart: Callable[..., Any]) -> None:
    assert apart(costs_on_the_device) == engine_on(torch.device("cpu"), "pyramid").costs


def facts_of_a_round_and_of_one_resumed(folder: Path) -> list[Statistics]:
    with pretended_device() as device:
        engine, resumed = (engine_on(device, "pyramid") for _ in range(2))
        loop = engine.loop()
        next(loop)
        loop.send(STEERED)
        save(folder, engine.state_dict(), engine.round)
        resumed.load_state_dict(load_newest(folder)[0])
        other = resumed.loop()
        next(other)
        return [each.send(STEERED) for each in (loop, other)]


def test_a_run_goes_on_on_the_device(apart: Callable[..., Any], tmp_path: Path) -> None:
    once, again = apart(facts_of_a_round_and_of_one_resumed, tmp_path / "checkpoints")
    assert {**again, "seconds": 0.0} == {**once, "seconds": 0.0}


def accuracy_and_weights(path: Path) -> float | None:
    with pretended_device() as device:
        engine = engine_on(device, "generator")
        engine.evaluation = load_dataset("digits", None, "test")
        save_weights(engine.student, path)
        return engine.accuracy(engine.student)


def test_a_student_is_measured_and_saved_from_the_device(apart: Callable[..., Any], tmp_path: Path) -> None:
    measured = apart(accuracy_and_weights, tmp_path / "student.safetensors")
    engine = engine_on(torch.device("cpu"), "generator")
    engine.evaluation = load_dataset("digits", None, "test")
    for weight in engine.student.parameters():
        weight.data.zero_()
    load_weights(engine.student, tmp_path / "student.safetensors")
    assert measured == pytest.approx(engine.accuracy(engine.student))


def what_a_run_writes(out: Path) -> tuple[list[str], str]:
    with pretended_device() as device, pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr(Display, "warn", lambda display, sentence: said.append(sentence))
        engine = engine_on(device, "generator")
        engine.evaluation = load_dataset("digits", None, "test")
        engine.config.tracking.every = engine.config.checkpoint.rounds = 2
        folder = RunFolder.create(out, "run")
        with folder.claimed():
            run(engine.config, engine, folder, Display(quiet=True))
        return sorted(path.name.split(".")[0] for path in folder.path.iterdir()), " ".join(said)


def test_a_whole_run_on_the_device_writes_all_that_a_run_writes(apart: Callable[..., Any], tmp_path: Path) -> None:
    written, said = apart(what_a_run_writes, tmp_path)
    assert {"buffer", "checkpoints", "events", "metrics", "replays", "report", "student", "summary"} <= set(written)
    assert "written" not in said, "by which it would be told what was not"


def what_a_training_heard() -> list[float]:
    heard: list[float] = []
    with pretended_device() as device:
        options = TeacherTraining(epochs=3, batch=32, shift=1)
        train(
            small_student(), load_dataset("digits", None, "test"), options, device, lambda _, loss: heard.append(loss)
        )
    return heard


def test_a_teacher_is_trained_on_the_device(apart: Callable[..., Any]) -> None:
    first, *_, last = apart(what_a_training_heard)
    assert last < 0.7 * first


def what_is_refused_and_what_waits() -> tuple[str, list[str]]:
    with pretended_device() as device:
        weight = torch.zeros((2, 3, 4, 4), device=device, requires_grad=True)
        weight.grad = torch.ones_like(weight).contiguous(memory_format=torch.channels_last)
        with pytest.raises(RuntimeError, match="_fused_adam_: a weight"):
            torch.optim.Adam([weight], fused=True).step()
        with pytest.raises(RuntimeError, match="of the device and of the host"):
            torch.stack([weight.sum(), torch.zeros(())])
        waits.clear()
        there, here = torch.ones(3, device=device), torch.ones(3)
        with pytest.raises(RuntimeError) as refused:
            there + here
        assert not waits
        assert float(there.sum()) == 3.0
        assert there[there > 2.0].tolist() == []
        assert here.to(device).cpu().tolist() == [1.0, 1.0, 1.0]
        return str(refused.value), list(waits)


def test_the_device_finds_what_a_gpu_would(apart: Callable[..., Any]) -> None:
    refused, waited = apart(what_is_refused_and_what_waits)
    assert "tensors of the device and of the host" in refused
    assert waited == ["aten::_local_scalar_dense", "aten::index", "tolist", "copy to the device", "copy to the host"]
