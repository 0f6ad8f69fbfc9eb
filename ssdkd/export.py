"""Hand a run's student on to other programs: `python -m ssdkd.export RUN --format onnx`.

The exported model takes float32 images (N, channels, height, width), any N, and returns logits (N, classes). It
expects them normalised as the teacher's were, (pixel / 255 - mean) / std; with `--with-normalisation` that is
baked in and it takes pixels in [0, 1]. What it is, and what it expects, travels inside the file as JSON: the
metadata `ssdkd` of an ONNX model, the extra file `ssdkd.json` of the other two.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssdkd.build import build_student, is_in_memory
from ssdkd.config import RunConfig, build, read_yaml
from ssdkd.data import ImageSpec
from ssdkd.errors import ConfigError, Parser, SsdkdError, first_line, run_command
from ssdkd.files import atomic_write_bytes, expanded
from ssdkd.models import load_weights, unwrapped
from ssdkd.tracking.folder import CONFIG, STUDENT, SUMMARY, RunFolder

LARGEST_DIFFERENCE = 1e-4
BATCHES = (1, 2, 5)  # sizes that the exported model is tried with; it is made with another one
_EXTRA_FILE = "ssdkd.json"

Predict = Callable[[Tensor], Tensor]


class Normalised(nn.Module):
    """A network behind the normalisation of its inputs: pixels in [0, 1] (N, c, H, W) -> logits (N, C)."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.network((pixels - self.mean) / self.std)
        return logits


@dataclass(frozen=True)
class Format:
    """One way to write a network down, and to read it back for the check."""

    suffix: str
    write: Callable[[nn.Module, Tensor, Path, str], None]  # network, example images, file, metadata as JSON
    read: Callable[[Path], Predict]


FORMATS: dict[str, Format] = {}


def register_format(name: str, suffix: str, read: Callable[[Path], Predict]) -> Callable[[Any], Any]:
    """Make a format known under the name that `--format` uses; decorates its writer."""

    def register(write: Callable[[nn.Module, Tensor, Path, str], None]) -> Any:
        FORMATS[name] = Format(suffix, write, read)
        return write

    return register


def _read_onnx(file: Path) -> Predict:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@register_format("onnx", ".onnx", _read_onnx)
def _write_onnx(network: nn.Module, example: Tensor, file: Path, metadata: str) -> None:
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"format onnx needs a package that is not here ({error}): pip install 'ssdkd[onnx]'"
        ) from error
    torch.onnx.export(
        network,
        (example,),
        file,
        input_names=["images"],
        output_names=["logits"],
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
        verbose=False,
    )
    model = onnx.load(str(file))
    entry = model.metadata_props.add()
    entry.key, entry.value = "ssdkd", metadata
    onnx.checker.check_model(model)
    onnx.save(model, str(file))


@register_format("torchscript", ".torchscript.pt", lambda file: torch.jit.load(str(file)))
def _write_torchscript(network: nn.Module, example: Tensor, file: Path, metadata: str) -> None:
    traced = torch.jit.trace(network, example, check_trace=False)  # the caller checks
    torch.jit.save(traced, str(file), _extra_files={_EXTRA_FILE: metadata})


@register_format("exported-program", ".pt2", lambda file: torch.export.load(str(file)).module())
def _write_exported_program(network: nn.Module, example: Tensor, file: Path, metadata: str) -> None:
    program = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, str(file), extra_files={_EXTRA_FILE: metadata})


def export(
    network: nn.Module, format_name: str, file: Path, shape: tuple[int, int, int], about: dict[str, Any]
) -> float:
    """Write `network` to `file`, whole or not at all, once what was written answers as the network does.

    Args:
        network: takes float32 images (N, *shape) with N of any size; stays as it is.
        format_name: one of `FORMATS`.
        file: replaced if it is there.
        shape: channels, height, width.
        about: plain data that travels inside the file.

    Returns:
        The largest difference between the logits of the two, on random images.

    Raises:
        ConfigError: the network cannot be written in this format, or answers differently then.
    """
    written = FORMATS[format_name]
    random = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="ssdkd-export-") as folder, torch.no_grad(), _silence():
        draft = Path(folder) / f"student{written.suffix}"
        network = unwrapped(network)
        with contextlib.suppress(Exception):  # one that cannot be copied is itself made what is written
            network = copy.deepcopy(network)
        network = taking_float32(network, shape)
        try:
            written.write(network, torch.rand(3, *shape, generator=random), draft, json.dumps(about))
            predict = written.read(draft)
            largest = 0.0
            for batch in BATCHES:
                images = torch.rand(batch, *shape, generator=random)
                largest = max(largest, (predict(images) - network(images)).abs().max().item())
        except SsdkdError:
            raise
        except Exception as error:  # whatever an exporter makes of somebody's network
            raise ConfigError(
                f"the student cannot be exported as {format_name}: {first_line(error)}; where its forward "
                "takes the number of images for fixed, as len(x) does, let it ask for x.shape[0]."
            ) from error
        if not largest <= LARGEST_DIFFERENCE:
            raise ConfigError(
                f"the student exported as {format_name} answers differently by up to {largest:.2g} "
                f"(at most {LARGEST_DIFFERENCE:g} is allowed); nothing was written, try another format."
            )
        try:
            atomic_write_bytes(file, draft.read_bytes())
        except OSError as error:
            raise ConfigError(f"{file} cannot be written: {error.strerror or error}.") from error
    return largest


def taking_float32(network: nn.Module, shape: tuple[int, int, int]) -> nn.Module:
    """The network as it is, if it takes float32 images (it may cast them inside); else all of it in float32."""
    network = network.cpu().eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    try:
        network(torch.zeros(1, *shape))
        return network
    except Exception:  # what else may be wrong with it comes up where it is written
        return network.float()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Exporters warn about their own future; what counts here is the check."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def student_of(folder: RunFolder) -> tuple[nn.Module, ImageSpec, dict[str, Any]]:
    """A run's student with its weights, what it sees, and the run's summary."""
    config = build(RunConfig, [read_yaml(str(folder / CONFIG))])
    if not folder.is_finished:
        raise ConfigError(
            f"{folder.path} holds no finished student; finish the run: python -m ssdkd.run --resume {folder.path}"
        )
    summary = folder.read_json(SUMMARY)
    try:
        image = summary["image"]
        spec = ImageSpec(
            channels=int(image["channels"]),
            height=int(image["height"]),
            width=int(image["width"]),
            num_classes=int(image["classes"]),
            mean=tuple(map(float, image["mean"])),
            std=tuple(map(float, image["std"])),
            flip=False,
            class_names=tuple(image["class_names"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder / SUMMARY} does not say what images the student takes; run again.") from error
    if is_in_memory(config.student.name):
        raise ConfigError(
            f"the student of {folder.path} was given in memory ({config.student.name[1:-1]}), which no name rebuilds: "
            "call ssdkd.export.export(student, ...) where it is at hand."
        )
    student = build_student(config, spec)
    load_weights(student, folder / STUDENT)
    return unwrapped(student), spec, summary


def run(argv: Sequence[str] | None) -> None:
    parser = Parser(prog="python -m ssdkd.export", description="Export a run's student, checked against it.")
    parser.add_argument("run", metavar="RUN", help="run folder of a finished run")
    parser.add_argument("--format", required=True, choices=sorted(FORMATS), help="what to write")
    parser.add_argument("--out", metavar="FILE", help="where to (default: into the run folder)")
    parser.add_argument(
        "--with-normalisation", action="store_true", help="take pixels in [0, 1] instead of normalised images"
    )
    given = parser.parse_args(argv)
    folder = RunFolder.existing(given.run)
    student, spec, summary = student_of(folder)
    mean, std = [round(v, 6) for v in spec.mean], [round(v, 6) for v in spec.std]
    if given.with_normalisation:
        expects = "pixels in [0, 1]"
        network: nn.Module = Normalised(student, spec.mean, spec.std)
    else:
        expects = f"pixels in [0, 1], normalised with mean {mean} and std {std}"
        network = student
    about = {
        "student": summary.get("student"),
        "input": expects,
        "shape": ["N", *spec.shape],
        "mean": list(spec.mean),
        "std": list(spec.std),
        "normalisation_inside": given.with_normalisation,
        "class_names": list(spec.class_names),
        "student_accuracy": summary.get("student_accuracy"),
    }
    file = expanded(given.out) if given.out else folder / f"student{FORMATS[given.format].suffix}"
    largest = export(network, given.format, file, spec.shape, about)
    print(f"{file}: {given.format}, input (N, {', '.join(map(str, spec.shape))}), {expects}; any N")
    print(f"largest difference to the student on random images: {largest:.1e}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; a user's mistake is one sentence and exit code 2."""
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
