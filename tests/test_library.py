"""Promises of `ssdkd.distill`: two networks in memory, the options of the command, nothing written unless asked."""

import copy
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint

import ssdkd
from agents.tasks import merged
from ssdkd.build import build_engine
from ssdkd.config import RunConfig, from_mapping
from ssdkd.data import dataset_spec, load_dataset
from ssdkd.errors import CheckpointError, ConfigError, SsdkdError
from ssdkd.models import create_model, load_weights
from ssdkd.run import main, run
from ssdkd.saving import Stopped
from ssdkd.tracking import Display

ROOT = Path(ssdkd.__file__).resolve().parent.parent
TASK = {"num_classes": 10, "in_channels": 1, "image_size": 8}
SMALL: dict[str, Any] = {
    "policy": "ssdkd",
    "rounds": 3,
    "device": "cpu",
    "inversion": {"images": 32, "warmup": 2, "steps": 2, "width": 8},
    "probe": {"images": 16},
    "buffer": {"capacity": 64},
    "distillation": {"batch": 32, "steps": 3},
}


def digits_teacher() -> nn.Module:
    teacher = create_model("convnet", {"widths": [48, 96, 128]}, **TASK)
    load_weights(teacher, Path(ssdkd.__file__).parent / "assets" / "digits_teacher.safetensors")
    return teacher


def a_student(seed: int = 0, **task: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return create_model("convnet_small", **{**TASK, **task})


def weights(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_importing_ssdkd_is_light() -> None:
    code = "import sys, ssdkd; assert 'torch' not in sys.modules; ssdkd.distill; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
    assert {"distill", "Result"} <= set(ssdkd.__all__)
    with pytest.raises(AttributeError, match="no attribute 'destill'"):
        ssdkd.destill  # noqa: B018


def test_the_student_is_trained_in_place_and_the_teacher_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    teacher, student = digits_teacher().train(), a_student()
    taught, untaught = weights(teacher), weights(student)
    result = ssdkd.distill(teacher, student, dataset="digits", **SMALL)
    assert result.student is student
    assert not same(weights(student), untaught)
    assert not student.training
    assert same(weights(teacher), taught)
    assert teacher.training
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert result.folder is None
    assert not list(tmp_path.iterdir()), "nothing is written unless asked for"
    assert capsys.readouterr().out == ""


def test_the_result_tells_what_the_commands_summary_tells() -> None:
    result = ssdkd.distill(digits_teacher(), a_student(), dataset="digits", **{**SMALL, "policy": "uniform", "seed": 5})
    assert result.summary["teacher_accuracy"] > 95
    assert (result.summary["rounds"], result.summary["policy"], result.summary["seed"]) == (3, "uniform", 5)
    assert [entry["round"] for entry in result.history] == [1, 2, 3]
    assert result.history[-1]["probe_kl"] == result.summary["probe_kl"]


@pytest.mark.parametrize("start", ["generator", "textures", "pyramid"])
def test_what_was_chosen_for_a_run_makes_the_same_run_when_it_is_given(start: str) -> None:
    left_open = merged(SMALL, {"inversion": {"start": start, "steps": None, "warmup": None}})
    first, second = a_student(), a_student()
    chosen = ssdkd.distill(digits_teacher(), first, dataset="digits", **left_open).summary["chosen"]
    assert chosen["inversion"]["start"] == start
    given = merged(left_open, chosen)
    assert None not in given["inversion"].values()
    assert ssdkd.distill(digits_teacher(), second, dataset="digits", **given).summary["chosen"] == chosen
    assert same(weights(first), weights(second))


def test_the_device_is_named_as_pytorch_names_it() -> None:
    result = ssdkd.distill(digits_teacher(), a_student(), dataset="digits", **{**SMALL, "device": torch.device("cpu")})
    assert result.summary["device"] == "cpu"
    with pytest.raises(ConfigError, match="'mps:1' is not supported"):
        ssdkd.distill(digits_teacher(), a_student(), dataset="digits", **{**SMALL, "device": torch.device("mps", 1)})


def test_evaluation_data_do_not_change_the_student() -> None:
    spec = dataset_spec("digits")
    image = {"channels": 1, "height": 8, "width": 8, "classes": 10, "mean": list(spec.mean), "std": list(spec.std)}
    seen = ssdkd.distill(digits_teacher(), a_student(), dataset="digits", tracking={"evaluate_every": 1}, **SMALL)
    blind = ssdkd.distill(digits_teacher(), a_student(), image=image, **SMALL)
    assert seen.summary["student_accuracy"] is not None
    assert blind.summary["student_accuracy"] is None
    assert same(weights(seen.student), weights(blind.student))


class Bare(nn.Module):
    """What a batch norm computes in evaluation, in a layer of one's own."""

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = layer.weight, layer.bias, layer.eps
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, getattr(layer, name))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        known = (self.running_mean, self.running_var, self.weight, self.bias)
        return nn.functional.batch_norm(maps, *known, eps=self.eps)


def with_bare_norms(network: nn.Module) -> nn.Module:
    for block in network.blocks:
        block[1] = Bare(block[1])
    return network


def spread_out(network: nn.Module) -> nn.Module:
    """Every other number of larger tensors."""
    for weight in network.parameters():
        weight.data = torch.stack([weight.data, weight.data], dim=-1)[..., 0]
    return network


def with_slopes(network: nn.Module) -> nn.Module:
    for weight in network.parameters():
        weight.grad = torch.ones_like(weight)
    return network


@pytest.mark.parametrize(
    ("of_teacher", "of_student"),
    [
        (nn.Module.train, nn.Module.eval),
        (nn.Sequential, nn.Sequential),
        (nn.DataParallel, nn.DataParallel),
        (nn.SyncBatchNorm.convert_sync_batchnorm, nn.SyncBatchNorm.convert_sync_batchnorm),
        (lambda network: network.to(memory_format=torch.channels_last), spread_out),
        (spread_out, with_slopes),
        (lambda network: network.requires_grad_(False), copy.deepcopy),
        (with_bare_norms, nn.Module.eval),
    ],
)
def test_networks_in_another_form_give_the_same_student(of_teacher: Any, of_student: Any) -> None:
    plain = ssdkd.distill(digits_teacher(), a_student(), dataset="digits", **SMALL)
    other = ssdkd.distill(of_teacher(digits_teacher()), of_student(a_student()), dataset="digits", **SMALL)
    assert all(map(torch.equal, plain.student.state_dict().values(), other.student.state_dict().values()))
    assert other.summary["student_accuracy"] == plain.summary["student_accuracy"]


@pytest.mark.parametrize("form", ["npz", "folder"])
def test_the_same_images_in_another_form_give_the_same_run(form: str, tmp_path: Path) -> None:
    digits = load_dataset("digits", None)
    images, labels = digits.images[:, 0].numpy(), digits.labels.numpy()
    root = tmp_path / form
    if form == "npz":
        with root.open("wb") as file:
            np.savez(file, images=images[::-1, ..., None], labels=labels[::-1].astype(np.uint8))
    else:
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            (root / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(root / str(label) / f"{number}.png")
    image_facts = {"mean": list(digits.spec.mean), "std": list(digits.spec.std)}
    plain, other = (
        ssdkd.distill(digits_teacher(), a_student(), **options, **SMALL)
        for options in ({"dataset": "digits"}, {"dataset": form, "data_root": str(root), "image": image_facts})
    )
    assert same(weights(plain.student), weights(other.student))
    for role in ("teacher", "student"):
        assert other.summary[f"{role}_accuracy"] == plain.summary[f"{role}_accuracy"]


def test_with_out_a_run_folder_is_left(tmp_path: Path) -> None:
    result = ssdkd.distill(digits_teacher(), a_student(), dataset="digits", out=str(tmp_path), **SMALL)
    assert result.folder is not None
    assert result.folder.parent == tmp_path
    assert len(result.history) == 3
    saved = a_student(seed=1)
    load_weights(saved, result.folder / "student.safetensors")
    assert same(weights(saved), weights(result.student))


def test_a_call_that_is_refused_in_its_warm_up_leaves_no_folder(tmp_path: Path) -> None:
    inversion = {**SMALL["inversion"], "terms": {"adversarial": 1.0}}
    with pytest.raises(ConfigError, match=r"inversion\.terms: none of them can be searched by"):
        ssdkd.distill(
            digits_teacher(), a_student(), dataset="digits", out=str(tmp_path), **{**SMALL, "inversion": inversion}
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_stopped_call_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed = ssdkd.distill(digits_teacher(), a_student(), dataset="digits", **SMALL)
    with monkeypatch.context() as patched:
        patched.setattr(Display, "update", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Stopped) as stopped:
            ssdkd.distill(digits_teacher(), a_student(), dataset="digits", out=str(tmp_path), **SMALL)
    (folder,) = tmp_path.iterdir()
    assert str(stopped.value).endswith(f"goes on with: ssdkd.distill(teacher, student, resume={str(folder)!r})")
    assert not [file for file in psutil.Process().open_files() if file.path.startswith(str(folder))]
    assert main(["--resume", str(folder)]) == 2
    assert "go on with ssdkd.distill(teacher, student, resume=RUN)" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="leave out all others"):
        ssdkd.distill(digits_teacher(), a_student(), resume=folder, rounds=5)
    resumed = ssdkd.distill(digits_teacher(), a_student(seed=9), resume=folder)
    assert same(weights(resumed.student), weights(undisturbed.student))
    assert resumed.folder == folder


def test_a_finished_call_is_not_played_again_but_hands_its_student_out(tmp_path: Path) -> None:
    done = ssdkd.distill(digits_teacher(), a_student(), dataset="digits", out=str(tmp_path), **SMALL)
    assert done.folder is not None
    files = {file: file.read_bytes() for file in done.folder.iterdir() if file.is_file()}
    again = ssdkd.distill(digits_teacher(), a_student(seed=9).train(), resume=done.folder)
    assert same(weights(again.student), weights(done.student))
    assert not again.student.training
    assert (again.summary, again.folder, again.history) == (done.summary, done.folder, [])
    assert {file: file.read_bytes() for file in done.folder.iterdir() if file.is_file()} == files


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dataset": "digits", "rouns": 3}, "did you mean rounds"),
        ({"dataset": "digits", "buffer": {"capacity": 16}}, "buffer.capacity is 16"),
        ({"dataset": "digits", "minutes": 0}, "leaves nothing to do"),
        ({"image": {"channels": 1, "height": 8, "width": 8}}, "image.classes is not known"),
        ({"dataset": "digits", "device": "gpu"}, "not a device"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_a_sentence(options: dict[str, Any], says: str) -> None:
    with pytest.raises(SsdkdError) as caught:
        ssdkd.distill(digits_teacher(), a_student(), **options)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_networks_that_do_not_fit_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match=re.escape("teacher and student need the same classes")):
        ssdkd.distill(digits_teacher(), a_student(num_classes=7), dataset="digits", **SMALL)
    with pytest.raises(ConfigError, match="the student cannot take images of 1x8x8"):
        ssdkd.distill(digits_teacher(), a_student(in_channels=3), dataset="digits", **SMALL)
    spoilt = copy.deepcopy(digits_teacher())
    with torch.no_grad():
        next(spoilt.parameters()).fill_(float("nan"))
    with pytest.raises(CheckpointError, match="the teacher's weights hold NaN or infinity"):
        ssdkd.distill(spoilt, a_student(), dataset="digits", **SMALL)
    spoilt = a_student()
    with torch.no_grad():
        next(spoilt.parameters()).fill_(float("inf"))
    with pytest.raises(CheckpointError, match="the student's weights hold NaN or infinity"):
        ssdkd.distill(digits_teacher(), spoilt, dataset="digits", **SMALL)


def test_the_callers_random_numbers_are_left_alone() -> None:
    networks = digits_teacher(), a_student()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    ssdkd.distill(*networks, dataset="digits", **SMALL)
    assert torch.equal(torch.rand(3), expected)


def test_the_callers_gpu_is_not_seeded_by_a_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.manual_seed` seeds every GPU, one that is started later too."""

    def seeded(*_: object) -> None:
        raise AssertionError("a GPU was seeded")

    teacher, student = digits_teacher(), a_student()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded)
    ssdkd.distill(teacher, student, dataset="digits", **SMALL)


def test_the_callers_number_of_threads_is_left_alone() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        ssdkd.distill(digits_teacher(), a_student(), dataset="digits", threads=1, **SMALL)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_caller_may_be_without_gradients(mode: Any) -> None:
    networks = digits_teacher(), a_student()
    before = [p.clone() for p in networks[1].parameters()]
    with mode():
        ssdkd.distill(*networks, dataset="digits", **SMALL)
    assert any(not torch.equal(p, was) for p, was in zip(networks[1].parameters(), before, strict=True))


class Unpooled(nn.Module):
    """Does what a CPU too refuses where algorithms have to be deterministic, as a GPU refuses the sums to draw by."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        largest, places = nn.functional.max_pool2d(images, 2, return_indices=True)
        return self.network(images + nn.functional.max_unpool2d(largest, places, 2))  # type: ignore[no-any-return]


def test_the_caller_may_ask_for_deterministic_algorithms() -> None:
    teacher, student = digits_teacher(), Unpooled(a_student())
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.warns(UserWarning, match="does not have a deterministic implementation"):
            ssdkd.distill(teacher, student, dataset="digits", **SMALL)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled(), "the caller's mode stays as it was"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_callers_autocast_changes_no_student(precision: str) -> None:
    plain, inside = a_student(), a_student()
    options = {"dataset": "digits", "precision": precision, **SMALL}
    config = from_mapping(RunConfig, options)
    run(config, build_engine(config, digits_teacher(), plain), None, Display(quiet=True))
    with torch.autocast("cpu", torch.bfloat16):
        ssdkd.distill(digits_teacher(), inside, **options)
    assert same(weights(inside), weights(plain))


@pytest.mark.parametrize("policy", ["ssdkd", "learned"])
def test_the_callers_default_device_changes_no_student(policy: str) -> None:
    networks = [(digits_teacher(), a_student()) for _ in range(2)]
    options = {**SMALL, "policy": policy, "dataset": "digits"}
    ssdkd.distill(*networks[0], **options)
    with torch.device("meta"):  # as after torch.set_default_device
        ssdkd.distill(*networks[1], **options)
        assert torch.empty(0).device.type == "meta", "the caller's stays as it was"
    assert same(weights(networks[0][1]), weights(networks[1][1]))


def test_the_callers_default_numbers_change_no_student() -> None:
    networks = [(digits_teacher(), a_student()) for _ in range(2)]
    ssdkd.distill(*networks[0], dataset="digits", **SMALL)
    torch.set_default_dtype(torch.float64)
    try:
        ssdkd.distill(*networks[1], dataset="digits", **SMALL)
        assert torch.get_default_dtype() == torch.float64, "the caller's stay as they were"
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(weights(networks[0][1]), weights(networks[1][1]))


class Viewing(nn.Module):
    """A user's network that flattens by `view`, which only maps of one layout bear."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.head = nn.Linear(4 * 8 * 8, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.conv(images)
        logits: torch.Tensor = self.head(maps.view(len(maps), -1))
        return logits


@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_that_flattens_by_view_is_told_what_to_do_and_then_runs(channels: int) -> None:
    size = {"channels": channels, "height": 8, "width": 8, "classes": 10}
    with pytest.raises(ConfigError, match="give --layout contiguous"):
        ssdkd.distill(Viewing(channels), Viewing(channels), image=size, **SMALL)
    result = ssdkd.distill(Viewing(channels), Viewing(channels), layout="contiguous", image=size, **SMALL)
    assert result.student(torch.zeros(2, channels, 8, 8)).shape == (2, 10)


class Volumes(nn.Module):
    """A network that takes an image for a volume of one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv3d(1, 4, (1, 3, 3)), nn.Linear(4, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.conv(images[:, None]).relu().mean(dim=(2, 3, 4)))
        return logits


def test_networks_that_convolve_volumes_are_taken_in_either_layout() -> None:
    for layout in ("auto", "contiguous"):
        assert ssdkd.distill(Volumes(), Volumes(), dataset="digits", layout=layout, **SMALL).summary["rounds"] == 3


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_networks_with_parts_in_torchscript_are_taken() -> None:
    def scripted() -> nn.Module:
        head = torch.jit.script(nn.Linear(64, 10))
        return nn.Sequential(nn.Flatten(), head)

    teacher, student = scripted(), scripted()
    before = [weights(teacher), weights(student)]
    ssdkd.distill(teacher, student, dataset="digits", **SMALL)
    assert same(weights(teacher), before[0])
    assert not same(weights(student), before[1])
    assert all(weight.requires_grad for network in (teacher, student) for weight in network.parameters())


@pytest.mark.parametrize("average", [0.125, 0.0])
@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_weight_whose_gradient_is_masked_stays_where_it_is_masked(register: str, average: float) -> None:
    student = a_student()
    weight = student.linear.weight
    before = weight.detach().clone()
    mask = torch.ones_like(weight)
    mask[5:] = 0.0

    def in_place(weight: torch.Tensor) -> None:
        weight.grad *= mask

    getattr(weight, register)((lambda slope: slope * mask) if register == "register_hook" else in_place)
    learning = SMALL["distillation"] | {"average": average, "weight_decay": 0.0}
    ssdkd.distill(digits_teacher(), student, dataset="digits", **SMALL | {"distillation": learning})
    assert torch.equal(weight[5:], before[5:])
    assert not torch.equal(weight[:5], before[:5])


def test_batch_norm_that_a_student_holds_in_evaluation_mode_keeps_its_statistics() -> None:
    student = a_student()
    first, *others = (layer for layer in student.modules() if isinstance(layer, nn.BatchNorm2d))
    first.eval().requires_grad_(False)
    before = [layer.running_var.clone() for layer in (first, *others)]
    ssdkd.distill(digits_teacher(), student, dataset="digits", **SMALL)
    moved = [not torch.equal(layer.running_var, was) for layer, was in zip((first, *others), before, strict=True)]
    assert len(others) > 0
    assert moved == [False] + [True] * len(others)


def test_a_student_that_would_change_the_teacher_is_refused() -> None:
    teacher, student = digits_teacher(), a_student()
    student.more = teacher.linear  # type: ignore[attr-defined]
    for other, named in ((teacher, "blocks.0.0.weight"), (student, "more.weight")):
        with pytest.raises(ConfigError, match=f"the student's {named} is the teacher's own"):
            ssdkd.distill(teacher, other, dataset="digits", **SMALL)
    teacher.linear.requires_grad_(False)
    ssdkd.distill(teacher, student, dataset="digits", **SMALL)
    student.more = teacher.blocks[0].requires_grad_(False)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"the student's more\.1\.running_mean is the teacher's own"):
        ssdkd.distill(teacher, student, dataset="digits", **SMALL)


class Bypassed(nn.BatchNorm2d):
    """Runs as written, by way of no layer."""

    def __call__(self, maps: torch.Tensor) -> torch.Tensor:
        return self.forward(maps)


def test_batch_norm_that_goes_unseen_is_told_and_not_gone_by(capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for called in (nn.BatchNorm2d, Bypassed):
        teacher = digits_teacher()
        for layer in teacher.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.__class__ = called
        terms = ssdkd.distill(teacher, a_student(), **SMALL, dataset="digits").history[-1]
        assert ("term_batch_norm" in terms) == (called is nn.BatchNorm2d)
        said.append(capsys.readouterr().err)
    assert said[0] == ""
    assert re.fullmatch("warning: the teacher's batch norm goes unseen.* inversion starts from textures .*\n", said[1])


class AlwaysOn(nn.Dropout):
    """Drops in evaluation mode too."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(maps, 0.2)


@pytest.mark.parametrize("kind", ["chance", "batch", "neither"])
def test_a_teacher_whose_answer_depends_on_more_than_the_image_is_told(
    capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    teacher = digits_teacher()
    if kind == "chance":
        teacher = nn.Sequential(AlwaysOn(), teacher)
    if kind == "batch":
        for layer in teacher.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean = layer.running_var = None
    ssdkd.distill(teacher, a_student(), dataset="digits", **SMALL)
    told = "warning: the teacher answers otherwise when the same image is shown alone" in capsys.readouterr().err
    assert told == (kind != "neither")


def test_a_teacher_that_holds_what_it_computed_is_told_how_to_let_go_of_it() -> None:
    teacher = digits_teacher()
    teacher.register_forward_hook(lambda module, _, logits: setattr(module, "last", logits))
    teacher(torch.zeros(2, 1, 8, 8))
    with pytest.raises(
        ConfigError, match=r"the teacher cannot be copied .*: call it .* under torch\.no_grad\(\) first"
    ):
        ssdkd.distill(teacher, a_student(), dataset="digits", **SMALL)
    with torch.no_grad():
        teacher(torch.zeros(2, 1, 8, 8))
    assert ssdkd.distill(teacher, a_student(), dataset="digits", **SMALL).summary["teacher_accuracy"] > 95


class Masked(nn.Module):
    """A network that keeps a mask of infinities among its weights."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("mask", torch.full((10, 10), -torch.inf).triu(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.inner(images)
        return logits + torch.softmax(self.mask, dim=1).sum(dim=1)


def test_a_mask_of_infinities_is_no_trouble_and_comes_back(tmp_path: Path) -> None:
    teacher, student = Masked(digits_teacher()), Masked(a_student())
    result = ssdkd.distill(teacher, student, dataset="digits", out=str(tmp_path), **SMALL)
    assert result.summary["rollbacks"] == 0
    assert result.folder is not None
    again = Masked(a_student(seed=1))
    load_weights(again, result.folder / "student.safetensors")
    assert same(weights(again), weights(student))
    again.mask.fill_(0.0)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match="NaN or infinite numbers in mask"):
        load_weights(again, result.folder / "student.safetensors")
    next(m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)).running_var.fill_(torch.inf)  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match=r"the teacher's weights hold NaN or infinity in inner\..*running_var"):
        ssdkd.distill(teacher, student, dataset="digits", **SMALL)


class Odd(nn.Module):
    """A student that answers well when it is looked at, and not when it is trained."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.inner = how, a_student()

    def forward(self, images: torch.Tensor) -> Any:
        logits = self.inner(images)
        if self.training and self.how == "tuple":
            return logits, logits
        if self.training and self.how == "key":
            raise KeyError("train")
        if self.how == "elsewhere":
            return logits.detach() * torch.ones((), requires_grad=True)
        return logits.detach() if self.how == "detached" else logits


def test_a_student_that_cannot_be_copied_learns_where_no_mean_of_its_weights_is_asked_for() -> None:
    student = a_student()
    student.lock = threading.Lock()  # type: ignore[assignment]
    before = weights(student)
    with pytest.raises(ConfigError, match=r"set distillation\.average to 0"):
        ssdkd.distill(digits_teacher(), student, dataset="digits", **SMALL)
    plain = {**SMALL, "distillation": {**SMALL["distillation"], "average": 0}}
    ssdkd.distill(digits_teacher(), student, dataset="digits", **plain)
    assert not same(weights(student), before)


class Careless(nn.Module):
    """A teacher of a user, with a peculiarity."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.inner = how, digits_teacher()

    def forward(self, images: torch.Tensor) -> Any:
        if self.how == "key":
            raise KeyError("features")
        if self.how == "table":
            return {"logits": self.inner(images)}
        if self.how == "first":
            return self.inner(images[:1])
        if self.how == "softmax":
            return self.inner(images).softmax(dim=1)
        if self.how == "hard":
            return self.inner(images).argmax(dim=1, keepdim=True).int().expand(-1, 10)
        if self.how == "cut":
            return self.inner(images.detach())
        if self.how == "bounded":
            return self.inner(images.clamp_(0.0, 1.0))
        return self.inner(images.mul_(2.0) if self.how == "in place" else images)

    def get_extra_state(self) -> dict[str, str]:
        return {"trained": "long ago"}


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("key", "the teacher cannot take images of 1x8x8: KeyError: 'features'"),
        ("table", "answers with a dict; wrap it"),
        ("first", r"answers two images of 1x8x8 with \(1, 10\)"),
        ("in place", "changes the images that it is shown"),
        ("bounded", "changes the images that it is shown"),
        ("cut", "does not lead back to its input"),
        ("softmax", "answers with probabilities, not logits"),
        ("hard", r"answers with numbers of torch\.int32, not logits"),
    ],
)
def test_a_teacher_of_another_kind_is_refused(how: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ssdkd.distill(Careless(how), a_student(), dataset="digits", **SMALL)


def test_a_teacher_may_hold_more_than_tensors() -> None:
    result = ssdkd.distill(Careless("not"), a_student(), dataset="digits", **SMALL)
    assert result.summary["teacher_accuracy"] > 95


def test_networks_whose_layers_are_made_by_the_first_image_are_taken(tmp_path: Path) -> None:
    def lazy() -> nn.Module:
        return nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))

    result = ssdkd.distill(lazy(), lazy(), dataset="digits", out=str(tmp_path), **SMALL)
    assert result.summary["student_parameters"] == 40 + 10 * (4 * 36 + 1)
    drawn = torch.random.get_rng_state()
    again = ssdkd.distill(lazy(), lazy(), resume=result.folder)  # it is finished
    assert same(weights(again.student), weights(result.student))
    assert torch.equal(torch.random.get_rng_state(), drawn)


class Frugal(nn.Module):
    """A network that runs again on its way back rather than remember its maps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = checkpoint(self.inner, images, use_reentrant=False)
        return logits


def test_networks_that_run_again_on_their_way_back_are_taken() -> None:
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 10))
    ssdkd.distill(Frugal(plain), Frugal(a_student()), dataset="digits", **SMALL)
    with pytest.raises(ConfigError, match=r"torch\.utils\.checkpoint does not bear: leave that out"):
        ssdkd.distill(Frugal(digits_teacher()), a_student(), dataset="digits", **SMALL)


class Ungraded(nn.Module):
    """A teacher as people wrap one that is only to be asked."""

    def __init__(self, how: Callable[[], Any]) -> None:
        super().__init__()
        self.how, self.inner = how, digits_teacher()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with self.how():
            logits: torch.Tensor = self.inner(images)
        return logits


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        (lambda: Ungraded(torch.no_grad), "does not lead back to its input"),
        (lambda: Ungraded(torch.inference_mode), "does not lead back to its input"),
        (lambda: digits_teacher().half(), r"float16: hand over the network.float\(\)"),
        (lambda: torch.jit.trace(digits_teacher().eval(), torch.zeros(1, 1, 8, 8)), "TorchScript"),
        (
            lambda: nn.Sequential(torch.jit.trace(digits_teacher().eval(), torch.zeros(1, 1, 8, 8))),
            "TorchScript does not bear",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_teacher_that_images_cannot_be_searched_by_is_refused(teacher: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ssdkd.distill(teacher(), a_student(), dataset="digits", **SMALL)


@pytest.mark.parametrize(
    ("student", "says"),
    [
        (lambda: a_student().requires_grad_(False), "no weights that could learn"),
        (lambda: nn.Flatten(), "the student"),
        (lambda: Odd("tuple"), r"cannot be trained: it answers 2 images in training with a tuple, not \(2, 10\)"),
        (lambda: Odd("key"), "cannot be trained: .*train"),
        (lambda: Odd("detached"), "cannot be trained: its answers do not depend on its weights"),
        (lambda: Odd("elsewhere"), "cannot be trained: .*do not depend on its weights"),
        (lambda: a_student().to("meta"), "meta device"),
        (lambda: "wrn16_1", "hand over a torch.nn.Module"),
        (lambda: torch.export.export(a_student(), (torch.zeros(2, 1, 8, 8),)).module(), "a program of torch.export"),
    ],
)
def test_a_student_that_cannot_learn_is_refused(student: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ssdkd.distill(digits_teacher(), student(), dataset="digits", **SMALL)


class Waves(nn.Module):
    """A network with a filter of complex numbers, as those that work on frequencies have."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.ones(8, 5, dtype=torch.complex64))
        self.head = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.fft.irfft2(torch.fft.rfft2(images) * self.filter).flatten(1))
        return logits


@pytest.mark.parametrize("optimizer", ["sgd", "muon", "adamw"])
def test_a_student_of_complex_weights_is_refused(optimizer: str) -> None:
    how = {**SMALL, "distillation": {"optimizer": optimizer}}
    with pytest.raises(ConfigError, match="filter is of complex numbers"):
        ssdkd.distill(digits_teacher(), Waves(), dataset="digits", **how)


def test_a_student_that_cannot_learn_by_one_image_at_a_time_is_refused_for_such_batches() -> None:
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10))
    options = {**SMALL, "distillation": {"batch": 1, "steps": 3}}
    with pytest.raises(ConfigError, match=r"cannot be trained: .* batches are of one"):
        ssdkd.distill(digits_teacher(), student, dataset="digits", **options)
    options["distillation"]["batch"] = 2
    assert ssdkd.distill(digits_teacher(), student, dataset="digits", **options).summary["rounds"] == 3


def test_the_readmes_ten_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's Python block as it stands, with its numbers made small."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [b for b in blocks if "ssdkd.distill(" in b]
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    small = re.sub(r"rounds=\d+", "rounds=2", block)
    assert small != block
    called: dict[str, Any] = {}
    plain = ssdkd.distill

    def shrunk(*networks: nn.Module, **options: Any) -> Any:
        called.update(options)
        smaller = {name: {**SMALL[name], **options.get(name, {})} for name in ("inversion", "probe")}
        return plain(*networks, **{**options, **smaller})

    monkeypatch.setattr(ssdkd, "distill", shrunk)
    space: dict[str, Any] = {}
    exec(compile(small, "README.md", "exec"), space)
    assert called["rounds"] == 2
    assert space["result"].summary["rounds"] >= 1
