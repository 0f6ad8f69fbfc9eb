"""Promises of `python -m ssdkd.export`: other programs get exactly the student, or a sentence that says why not."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssdkd import export as module
from ssdkd.export import FORMATS, Normalised, export, main
from ssdkd.models import create_model, load_weights
from ssdkd.run import main as run

SMALL = [
    *("--rounds", "2", "--device", "cpu", "--inversion.images", "32", "--inversion.warmup", "2", "--quiet"),
    *("--inversion.steps", "2", "--inversion.width", "8", "--probe.images", "16"),
    *("--buffer.capacity", "64", "--distillation.batch", "32", "--distillation.steps", "3"),
    *("--policy", "ssdkd"),
]
needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="pip install 'ssdkd[onnx]'",
)
EVERY_FORMAT = [pytest.param(name, marks=needs_onnx if name == "onnx" else ()) for name in sorted(FORMATS)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    assert run([*SMALL, "--out", str(out)]) == 0
    (folder,) = out.iterdir()
    return folder


@pytest.fixture(scope="module")
def student(finished: Path) -> nn.Module:
    widths = {"widths": [16, 28, 40]}
    network = create_model("convnet_small", widths, num_classes=10, in_channels=1, image_size=8)
    load_weights(network, finished / "student.safetensors")
    return network.eval()


def metadata(name: str, file: Path) -> dict[str, Any]:
    """What an exported file says about itself, read by the tools that others have."""
    if name == "onnx":
        import onnxruntime

        text = onnxruntime.InferenceSession(str(file)).get_modelmeta().custom_metadata_map["ssdkd"]
    else:
        extra = {"ssdkd.json": ""}
        if name == "torchscript":
            torch.jit.load(str(file), _extra_files=extra)
        else:
            torch.export.load(str(file), extra_files=extra)
        text = extra["ssdkd.json"]
    about: dict[str, Any] = json.loads(text)
    return about


@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_the_exported_model_is_the_student_for_any_number_of_images(
    name: str, finished: Path, student: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(finished), "--format", name]) == 0
    said = capsys.readouterr().out
    file = finished / f"student{FORMATS[name].suffix}"
    assert str(file) in said
    assert "normalised with mean [" in said
    assert "largest difference" in said
    predict = FORMATS[name].read(file)
    with torch.no_grad():
        for batch in (1, 3, 17):
            images = torch.randn(batch, 1, 8, 8)
            torch.testing.assert_close(predict(images), student(images), atol=1e-4, rtol=0)
    about = metadata(name, file)
    assert about["shape"] == ["N", 1, 8, 8]
    assert about["normalisation_inside"] is False
    assert len(about["class_names"]) == 10


@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_with_normalisation_it_takes_pixels(
    name: str, finished: Path, student: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "deployed.bin"
    assert main([str(finished), "--format", name, "--out", str(file), "--with-normalisation"]) == 0
    assert "pixels in [0, 1]; any N" in capsys.readouterr().out
    about = metadata(name, file)
    assert about["normalisation_inside"] is True
    pixels = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        expected = student((pixels - about["mean"][0]) / about["std"][0])
        torch.testing.assert_close(FORMATS[name].read(file)(pixels), expected, atol=1e-4, rtol=0)


def test_normalised_divides_channel_by_channel() -> None:
    network = Normalised(nn.Flatten(), mean=[0.0, 0.5], std=[1.0, 0.25])
    assert torch.equal(network(torch.ones(1, 2, 1, 1)), torch.tensor([[1.0, 2.0]]))


class Forgetful(nn.Module):
    """Answers differently when it is asked the second time, as a badly traced network would."""

    asked = 0

    def forward(self, images: Tensor) -> Tensor:
        self.asked += 1
        return images.flatten(1).sum(1, keepdim=True) + self.asked


def test_a_model_that_answers_differently_is_not_written(tmp_path: Path) -> None:
    file = tmp_path / "student.pt"
    with pytest.raises(module.ConfigError, match="answers differently by up to"):
        export(Forgetful(), "torchscript", file, (1, 8, 8), {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["torchscript", "exported-program"])
def test_a_compiled_student_is_exported_as_the_one_inside(name: str, tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    for number, student in enumerate((torch.compile(plain), nn.DataParallel(plain))):
        assert export(student, name, tmp_path / f"{number}.pt", (1, 8, 8), {}) <= 1e-4


class Precise(nn.Module):
    """Takes float32 images, and goes on in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10).double()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(images.double().flatten(1)).float()
        return logits


@pytest.mark.parametrize("name", EVERY_FORMAT)
@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
def test_a_student_of_any_precision_is_exported(name: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).to(dtype) if dtype else Precise()
    assert export(student, name, tmp_path / f"student{FORMATS[name].suffix}", (1, 8, 8), {}) <= 1e-4


def test_the_network_stays_as_it_is(tmp_path: Path) -> None:
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double().train()
    export(student, "torchscript", tmp_path / "student.pt", (1, 8, 8), {})
    assert student.training
    assert student[1].weight.dtype == torch.float64


class Undecided(nn.Module):
    """Goes by the content of its input, which no graph can hold."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) if images.sum().item() > 0 else -images.flatten(1)


def test_a_model_that_no_graph_holds_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(module.ConfigError, match="cannot be exported as exported-program") as caught:
        export(Undecided(), "exported-program", tmp_path / "student.pt2", (1, 8, 8), {})
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


class Counting(nn.Module):
    """Asks for the number of images in a way that a graph takes for fixed."""

    def forward(self, images: Tensor) -> Tensor:
        return images.reshape(len(images), -1)


@pytest.mark.parametrize("name", ["torchscript", "exported-program"])
def test_a_model_for_one_number_of_images_is_told_what_to_do(name: str, tmp_path: Path) -> None:
    file, refused = tmp_path / "student.pt", ""
    try:
        export(Counting(), name, file, (1, 8, 8), {})
    except module.ConfigError as error:
        refused = str(error)
    if name == "exported-program" and not refused:  # PyTorch before 2.8 sees through len
        assert torch.export.load(str(file)).module()(torch.zeros(7, 1, 8, 8)).shape == (7, 64)
    else:
        assert "x.shape[0]" in refused
        assert not file.exists()


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_mistakes_are_one_sentence(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a run folder" in refusal(capsys, str(tmp_path), "--format", "torchscript")
    assert "invalid choice: 'onxn'" in refusal(capsys, str(finished), "--format", "onxn")
    assert "--format" in refusal(capsys, str(finished))
    nowhere = str(tmp_path / "no" / "folder.pt")
    assert f"{nowhere} cannot be written" in refusal(capsys, str(finished), "--format", "torchscript", "--out", nowhere)


def test_an_unfinished_run_has_nothing_to_export(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text((finished / "config.yaml").read_text())
    said = refusal(capsys, str(tmp_path), "--format", "torchscript")
    assert f"finish the run: python -m ssdkd.run --resume {tmp_path}" in said


def test_a_damaged_student_is_refused(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.yaml", "summary.json", "student.safetensors"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    (tmp_path / "student.safetensors").write_bytes(b"12345678")
    assert "student.safetensors" in refusal(capsys, str(tmp_path), "--format", "torchscript")
    told = json.loads((finished / "summary.json").read_text())
    for strange in ({}, {"image": {**told["image"], "mean": ["x"]}}, {"image": {**told["image"], "height": "x"}}):
        (tmp_path / "summary.json").write_text(json.dumps(strange))
        assert "does not say what images" in refusal(capsys, str(tmp_path), "--format", "torchscript")


def test_onnx_without_its_packages_says_what_to_install(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "pip install 'ssdkd[onnx]'" in refusal(capsys, str(finished), "--format", "onnx")
