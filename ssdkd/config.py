"""Typed configuration: one schema, read from YAML and overridden on the command line.

The flags are made from the schema, the values are read and typed by OmegaConf; what does not fit is refused in
one sentence that names the key, what was expected, and the nearest key that exists.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import sys
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ssdkd.errors import ConfigError, Parser, first_line

Schema = TypeVar("Schema")


def option(
    default: Any,
    meaning: str,
    *,
    choices: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A field of the schema: its default, one line of meaning, and what it may be."""
    meta = {"meaning": meaning, "choices": tuple(choices), "low": low, "high": high}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=meta)
    return field(default=default, metadata=meta)


def group(schema: type[Any], meaning: str) -> Any:
    """A field of the schema that is a schema itself."""
    return field(default_factory=schema, metadata={"meaning": meaning})


@dataclass
class TeacherConfig:
    name: str = option("convnet", "registered model, or an import path such as my_pkg.nets:build")
    checkpoint: str | None = option(None, "weights: .safetensors, or .pth read as data only; 'embedded' ships")
    arguments: dict[str, Any] = option({}, "keyword arguments of the model")


@dataclass
class StudentConfig:
    name: str = option("convnet", "registered model, or an import path such as my_pkg.nets:build")
    arguments: dict[str, Any] = option({}, "keyword arguments of the model")


@dataclass
class ImageConfig:
    """What the teacher sees; a known data set's name fills in whatever is left null."""

    channels: int | None = option(None, "colour channels", low=1)
    height: int | None = option(None, "pixels", low=1)
    width: int | None = option(None, "pixels", low=1)
    classes: int | None = option(None, "classes of the teacher", low=2)
    mean: list[float] | None = option(
        None, "the teacher's normalisation of pixels in [0, 1], per channel; null: as the data set says, else 0.5"
    )
    std: list[float] | None = option(None, "the same, the divisor; null: as the data set says, else 0.25")
    flip: bool | None = option(None, "whether a mirrored image keeps its class; null: as the data set says, else no")


@dataclass
class InversionConfig:
    images: int = option(128, "candidates made in a round", low=1, high=1_000_000)
    steps: int | None = option(
        None, "steps of the search for each batch of candidates; null: 10 on a pyramid, 5 else", low=1
    )
    start: str = option(
        "auto",
        "what the search works on: a generator that learns, random textures, or a pyramid of corrections to textures; "
        "auto: with batch norm the pyramid, below 16 pixels the generator; without it the textures",
        choices=("auto", "generator", "textures", "pyramid"),
    )
    pixel_rate: float = option(0.05, "how far a step moves the pixels of a texture, on average", low=0)
    latent: int = option(128, "size of the latent vector", low=1, high=1_000_000)
    width: int = option(32, "channels of the generator's last block", low=1)
    subpixel: bool = option(True, "whether the generator works at half the image size and shuffles pixels at last")
    output: str = option(
        "sigmoid",
        "how pixels come about: freely, or with the normalisation's statistics",
        choices=("sigmoid", "normalised"),
    )
    textures: float | None = option(
        None,
        "share of the candidates left as random textures; null: 0, or 0.5 where the search starts from textures",
        low=0,
        high=1,
    )
    blends: float | None = option(
        None,
        "mixtures of two images for each one made: the teacher labels them, so they cost little; null: 1 on a pyramid, "
        "else 0",
        low=0,
        high=16,
    )
    conditional: bool = option(False, "whether the generator is told the target class")
    generator_rate: float = option(3e-3, "learning rate of the adapting generator", low=0)
    latent_rate: float = option(1.5e-2, "learning rate of the latents", low=0)
    meta_rate: float = option(3e-3, "learning rate of the base generator", low=0)
    restart: int | None = option(
        None, "round in which the base generator's first layer begins anew; null: never", low=1
    )
    meta: str = option("fomaml", "how the base follows", choices=("fomaml", "reptile", "continue"))
    augment: bool = option(
        False, "whether each step looks at images shifted and mirrored at random, as the student does (buffer.shift)"
    )
    targets: str = option(
        "balanced",
        "whether the classes asked for are as even as their shares allow, or drawn one by one",
        choices=("balanced", "drawn"),
    )
    memory: float = option(0.0, "share of earlier batches in the batch-norm statistics", low=0, high=0.99)
    warmup: int | None = option(
        None,
        "rounds of inversion before the first student step; null: 20 for a generator, which has to learn, else 3",
        low=1,
    )
    warmup_kept: float | None = option(
        None,
        "share of the warm-up's images, its newest, that enters the buffer; null: 0.5 with a generator, else 1",
        low=0,
        high=1,
    )
    terms: dict[str, float] | None = option(None, "weight of each loss term; null: chosen by the teacher's layers")


@dataclass
class BufferConfig:
    capacity: int = option(5000, "synthetic images kept", low=1, high=10**15)
    views: int = option(4, "stored views of an image with their teacher logits; 0: ask the teacher anew", low=0)
    shift: int | None = option(None, "largest shift of a view, in pixels; null: an eighth of the image", low=0)
    border: str = option("mirrored", "what a shift brings in from outside the image", choices=("mirrored", "black"))
    rendered: bool | None = option(
        None, "whether stored views are kept as images, for faster replay; null: where they take at most 256 MiB"
    )
    fresh: bool = option(False, "whether a round's candidates take the place of all before them")


@dataclass
class DistillationConfig:
    batch: int = option(64, "images in a student step", low=1)
    steps: int = option(100, "student steps in a round at effort 1 and batch 1", low=1)
    optimizer: str = option(
        "auto",
        "the student's optimiser; auto: muon for a student of at most a million weights where the search is on a "
        "pyramid, else sgd",
        choices=("auto", "sgd", "muon", "adam", "adamw"),
    )
    learning_rate: float = option(0.1, "the largest learning rate", low=0)
    momentum: float = option(0.9, "momentum of sgd and muon", low=0)
    nesterov: bool = option(True, "whether that momentum looks ahead")
    weight_decay: float = option(1e-4, "weight decay", low=0)
    schedule: str = option(
        "cosine", "the learning rate over the budget; constant: whatever `anneal` says", choices=("cosine", "constant")
    )
    average: float = option(
        0.125, "share of the steps so far whose mean is the student handed out; 0: the last step alone", low=0, high=1
    )
    temperature: float = option(10.0, "temperature of the distillation loss", low=1e-3)
    clip: float | None = option(
        None,
        "bound on the gradient's norm; 0: none; null: 2 for a student in which no layer normalises, else none",
        low=0,
    )


@dataclass
class ProbeConfig:
    images: int = option(256, "synthetic images that are measured on and never trained on", low=1, high=1_000_000)
    patience: int = option(4, "times as many steps as for a candidate that the search for one of them takes", low=1)


@dataclass
class TrackingConfig:
    metrics_every: int = option(
        1, "rounds between lines of metrics.jsonl; the last has one, and those with accuracy", low=1
    )
    evaluate_every: int = option(
        10, "rounds between measurements on the evaluation set, after the first round too; 0: only at the end", low=0
    )
    tensorboard: bool = option(True, "whether event files for TensorBoard are written")
    every: int = option(10, "rounds between points of TensorBoard's curves", low=1)
    pictures_every: int = option(0, "the same for histograms and pictures; 0: 50, or more where they would cost", low=0)
    images: bool = option(True, "whether pictures go to TensorBoard and into the report")
    report: bool = option(True, "whether report.html is written at the end")


@dataclass
class CheckpointConfig:
    rounds: int = option(100, "rounds between checkpoints; 0: by time alone", low=0)
    minutes: float = option(2.0, "minutes between checkpoints; 0: by rounds alone", low=0)
    keep: int = option(2, "how many of the newest are kept", low=1)
    on_error: str = option("continue", "where one cannot be written", choices=("continue", "stop"))


@dataclass
class RunConfig:
    """Everything that one distillation is made of."""

    teacher: TeacherConfig = group(TeacherConfig, "the network whose job is to be learned")
    student: StudentConfig = group(StudentConfig, "the network that learns it")
    dataset: str | None = option(None, "evaluation set: its name also tells image size, classes, normalisation")
    data_root: str | None = option(None, "where the evaluation set lies; null: accuracy is measured on digits alone")
    image: ImageConfig = group(ImageConfig, "image size, classes and normalisation")
    policy: str = option("learned", "who decides", choices=("uniform", "random", "ssdkd", "learned"))
    policy_file: str | None = option(None, "a learned policy of agents.train; null: the one that ships")
    adapt: bool = option(False, "whether a learned policy goes on learning during the run")
    rounds: int | None = option(100, "budget, in rounds of effort 1; where minutes are given, those count", low=1)
    minutes: float | None = option(None, "budget, in minutes instead of rounds", low=0)
    seed: int = option(0, "everything random follows from it", low=0, high=2**48)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    precision: str = option(
        "auto",
        "arithmetic of convolutions; auto: bfloat16 for large networks where the hardware is quick at it",
        choices=("auto", "float32", "bfloat16"),
    )
    layout: str = option(
        "auto", "how maps lie in memory; auto: channels last", choices=("auto", "channels_last", "contiguous")
    )
    compile: str = option(
        "auto",
        "torch.compile the student's training step; auto: on a GPU, for 30,000 steps or 10 minutes and more",
        choices=("auto", "on", "off"),
    )
    threads: int = option(0, "CPU threads; 0: as PyTorch chooses", low=0, high=1024)
    out: str = option("runs", "folder in which every run makes a folder of its own")
    inversion: InversionConfig = group(InversionConfig, "making candidates")
    buffer: BufferConfig = group(BufferConfig, "the replay buffer")
    distillation: DistillationConfig = group(DistillationConfig, "training the student")
    probe: ProbeConfig = group(ProbeConfig, "measuring progress without data")
    tracking: TrackingConfig = group(TrackingConfig, "what is written down")
    checkpoint: CheckpointConfig = group(CheckpointConfig, "what a killed run goes on from")


def parse_command_line(
    schema: type[Schema],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    extra: Sequence[tuple[str, str, Any]] = (),
    default_config: str | None = None,
    exclusive: Sequence[str] = (),
    below: Sequence[tuple[dict[str, Any], str]] = (),
) -> tuple[Schema, argparse.Namespace]:
    """Read `--config`, then every other flag over it: -> the configuration and the values of the `extra` flags.

    `extra` are flags outside the schema: (name, meaning, default). `below` are mappings that all of it goes over, each
    with the name of its source. Of the keys in `exclusive`, one given on the command line unsets the others that the
    file set. `--help` and `--print-config` end the process.
    """
    parser = _parser(schema, prog, description, extra, default_config)
    argv = [_with_underscores(a) for a in (sys.argv[1:] if argv is None else argv)]
    known, unknown = parser.parse_known_args(argv)
    types = _leaf_types(schema)
    if unknown:
        flag = next((u for u in unknown if u.startswith("-")), unknown[0]).split("=")[0]
        raise ConfigError(f"unknown option {_with_dashes(flag)}{_nearest(flag.lstrip('-'), list(types), '--')}")
    given = vars(known)
    for key, text in given.items():
        if text == "":  # what is left of a variable that is not set
            raise ConfigError(
                f"{_with_dashes(f'--{key}')}: expected a value, got an empty word; fill it or leave it out."
            )
    layers = list(below)
    source = given.pop("config") or default_config
    if source is not None:
        layers.append(read_yaml(source))
    flags: dict[str, Any] = {}
    for key, text in given.items():
        if key in types and text is not None:
            _nest(flags, key, _read_flag(key, types[key], text))
    given_exclusively = [key for key in exclusive if flags.get(key) is not None]
    if len(given_exclusively) > 1:
        raise ConfigError(f"--{given_exclusively[0]} and --{given_exclusively[1]} exclude each other; give one.")
    if given_exclusively:
        flags |= {key: None for key in exclusive if key not in given_exclusively}
    layers.append((flags, "the command line"))
    config = build(schema, layers)
    if given["print_config"]:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config, known


def build(schema: type[Schema], layers: Sequence[tuple[dict[str, Any], str]]) -> Schema:
    """Lay mappings over the schema's defaults, later ones winning; each comes with the name of its source."""
    merged = OmegaConf.structured(schema)
    for values, source in layers:
        _refuse_unknown_keys(schema, values, source)
        _forget_what_was_of_another(merged, values)
        try:
            merged = OmegaConf.merge(merged, _plain(values, "", source))
        except (OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
            raise ConfigError(_type_message(schema, values, source, error)) from error
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the configuration cannot be resolved: {first_line(error)}.") from error
    _settle_switches(config)
    _check_values(config, "")
    return typing.cast(Schema, config)


def _plain(value: Any, key: str, source: str) -> Any:
    """Values with NumPy's numbers as Python's; an integer beyond all sizes is refused by its key."""
    if isinstance(value, dict):
        return {name: _plain(inner, f"{key}.{name}" if key else str(name), source) for name, inner in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(inner, key, source) for inner in value]
    if isinstance(value, int) and value.bit_length() > 64:
        raise ConfigError(f"{key} in {source}: a whole number of more than 64 bits; give a smaller one.")
    return value.item() if isinstance(value, np.generic) else value


def _settle_switches(config: Any) -> None:
    """Write true as on and false as off: YAML takes one for the other."""
    for entry in fields(config):
        value = getattr(config, entry.name)
        if is_dataclass(value):
            _settle_switches(value)
        elif "on" in entry.metadata.get("choices", ()):
            setattr(config, entry.name, {"true": "on", "false": "off"}.get(str(value).lower(), value))


def _forget_what_was_of_another(merged: DictConfig, values: dict[str, Any]) -> None:
    """A layer that names another model or algorithm starts without what the one before was given."""
    if "algorithm" in merged and values.get("algorithm", merged.algorithm) != merged.algorithm:
        merged.arguments = {}
    for role in ("teacher", "student"):
        given = values.get(role)
        if role not in merged or not isinstance(given, dict):
            continue
        if "name" in given and given["name"] != merged[role].name:
            merged[role].arguments = {}
            if role == "teacher":
                merged[role].checkpoint = None
        if isinstance(given.get("arguments"), dict):
            merged[role].arguments = {}  # given as a whole, not key by key


def read_yaml(name_or_file: str) -> tuple[dict[str, Any], str]:
    """Read a YAML by path, or a ready-made one by name: -> its mapping, and where it was found."""
    path = Path(os.path.expanduser(name_or_file))
    if not path.is_file():
        shipped = {p.stem: p for folder in _config_folders() for p in sorted(folder.glob("*.yaml"))}
        if path.suffix or len(path.parts) > 1 or name_or_file not in shipped:
            close = difflib.get_close_matches(name_or_file, shipped, 1)
            hint = f"did you mean {close[0]}?" if close else f"ready-made ones are: {', '.join(sorted(shipped))}."
            raise ConfigError(f"config {name_or_file!r} is neither a file nor a ready-made config; {hint}")
        path = shipped[name_or_file]
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where is not None else ""
        said = (getattr(error, "problem", None) or first_line(error))[:300]  # it may quote a tag of any length
        raise ConfigError(f"{path}{line} cannot be read as YAML: {said}.") from error
    if values is None:
        values = {}
    _refuse_unbounded(values, path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__} where settings by name were expected.")
    return values, str(path)


def _refuse_unbounded(values: Any, path: Path, most_values: int = 10_000, most_levels: int = 30) -> None:
    """Refuse what aliases blow up, or what holds itself, before anything walks through it."""
    level, seen = [values], 0
    for _ in range(most_levels):
        below: list[Any] = []
        for value in level:
            children = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            if isinstance(children, list):
                seen += len(children)
                if seen > most_values:
                    raise ConfigError(f"{path} expands to more than {most_values} values; write it without aliases.")
                below += children
        if not below:
            return
        level = below
    raise ConfigError(f"{path} nests more than {most_levels} levels deep; a config needs three.")


def to_yaml(config: Any) -> str:
    """The effective configuration as YAML that `--config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _config_folders() -> list[Path]:
    here = Path(__file__).resolve().parent
    return [folder for folder in (here / "configs", here.parent / "configs") if folder.is_dir()]


def _parser(
    schema: type[Any], prog: str, description: str, extra: Sequence[tuple[str, str, Any]], usual: str | None
) -> argparse.ArgumentParser:
    usage = f"{prog} [--config NAME_OR_FILE] [--KEY VALUE ...]"
    parser = _Parser(prog=prog, usage=usage, description=description)
    config = "a ready-made config by name, or a YAML file"
    if usual is not None:
        config += f" (default: {usual}, whose values go before the defaults below)".replace("%", "%%")
    parser.add_argument("--config", metavar="NAME_OR_FILE", help=config)
    parser.add_argument("--print_config", action="store_true", help="show the effective configuration and stop")
    for name, meaning, default in extra:
        if isinstance(default, bool):
            parser.add_argument(f"--{name}", action="store_true", help=meaning)
        else:
            parser.add_argument(f"--{name}", default=default, help=meaning)
    _add_flags(parser, schema, "")
    return parser


class _Parser(Parser):
    def format_help(self) -> str:
        lines = super().format_help().split("\n")
        return "\n".join(_with_dashes(line) for line in lines)


def _with_underscores(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _with_dashes(line: str) -> str:
    start = len(line) - len(line.lstrip())
    words = line[start:].split(" ")
    return line[:start] + " ".join(w.replace("_", "-") if w.lstrip("[").startswith("--") else w for w in words)


def _add_flags(parser: argparse.ArgumentParser, schema: type[Any], prefix: str) -> None:
    hints = typing.get_type_hints(schema)
    titled = None
    for entry in fields(schema):
        name, hint = prefix + entry.name, hints[entry.name]
        if is_dataclass(hint):
            _add_flags(parser.add_argument_group(name, entry.metadata["meaning"]), hint, f"{name}.")  # type: ignore[arg-type]
            continue
        titled = titled or parser
        meaning = entry.metadata["meaning"].replace("%", "%%")
        shown = _show(entry.default if entry.default is not MISSING else entry.default_factory())  # type: ignore[misc,operator]
        choices = entry.metadata["choices"]
        what = "|".join(choices) if choices else _type_name(hint)
        flags = {"nargs": "?", "const": "true"} if "true or false" in what or "on" in choices else {}
        titled.add_argument(f"--{name}", metavar=what, help=f"{meaning} (default: {shown})", **flags)  # type: ignore[arg-type]


def _show(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _type_name(hint: Any) -> str:
    names = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    if hint in names:
        return names[hint]
    kind, arguments = typing.get_origin(hint), [a for a in typing.get_args(hint) if a is not type(None)]
    if kind is list:
        of = {float: "numbers", int: "whole numbers", str: "names", Any: "values"}
        return f"list of {of.get(arguments[0], 'mappings')}"
    if kind is dict:
        return "mapping of names to numbers" if arguments[1] is float else "mapping"
    return _type_name(arguments[0]) if len(arguments) == 1 else "mapping"


def _leaf_types(schema: type[Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(schema)
    for entry in fields(schema):
        hint = hints[entry.name]
        if is_dataclass(hint):
            found |= _leaf_types(hint, f"{prefix}{entry.name}.")  # type: ignore[arg-type]
        else:
            found[prefix + entry.name] = hint
    return found


def _read_flag(key: str, hint: Any, text: str) -> Any:
    if _type_name(hint) == "text" and text not in ("null", "~"):
        return text
    if _type_name(hint) in ("whole number", "number") and re.fullmatch(r"[+-]?(0[\d_]+|\d+:.*)", text):
        return text  # YAML would take 010 for 8, and 1:30 for 90
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"--{key.replace('_', '-')} {text!r} cannot be read: {first_line(error)}.") from error


def _nest(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = value


def _nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
    shown = {k.replace("_", "-") if prefix else k: k for k in known}
    wanted = name.replace("_", "-") if prefix else name
    # the last part may be right in the wrong group
    close = [k for k in shown if k.rsplit(".", 1)[-1] == wanted.rsplit(".", 1)[-1]][:1]
    close = close or difflib.get_close_matches(wanted, shown, 1, 0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else "."


# By which a job or a folder of another command is known.
_KEYS_OF_OTHER_COMMANDS = {
    "algorithm": "agents.train",
    "axes": "agents.evaluate",
    "base": "agents.evaluate",
    "held_out": "agents.evaluate",
    "tasks": "agents.evaluate",
    "dataset": "ssdkd.run",
    "teacher": "ssdkd.run",
}


def _refuse_unknown_keys(schema: type[Any], values: dict[str, Any], source: str, prefix: str = "") -> None:
    hints = typing.get_type_hints(schema)
    names = [f.name for f in fields(schema)]
    for key, value in values.items():
        if not isinstance(key, str) or key not in names:
            here = [prefix + n for n in names]
            shown = cut(f"{prefix}{key}")[1:-1]
            other = None if prefix else _KEYS_OF_OTHER_COMMANDS.get(key)
            hint = f"; it is a key of python -m {other}." if other else _nearest(f"{prefix}{key}", here)
            raise ConfigError(f"unknown key {shown} in {source}{hint}")
        if is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ConfigError(f"{prefix}{key} in {source}: expected a mapping, got {cut(value)}.")
            _refuse_unknown_keys(hints[key], value, source, f"{prefix}{key}.")  # type: ignore[arg-type]


def _type_message(schema: type[Any], values: dict[str, Any], source: str, error: Exception) -> str:
    key = str(getattr(error, "full_key", None) or "")
    types = _leaf_types(schema)
    leaf = next((k for k in types if key == k or key.startswith((f"{k}.", f"{k}["))), None)
    if leaf is None:
        leaf = next((k for k in types if not _fits(schema, k, _at(values, k))), None)
        if leaf is None:
            return f"{source}: {first_line(error)}."
    value = _at(values, leaf)
    return f"{leaf} in {source}: expected {_type_name(types[leaf])}, got {cut(value)}."


def _fits(schema: type[Any], key: str, value: Any) -> bool:
    """Whether a value alone is taken, for errors that do not say where they arose."""
    if value is None:
        return True
    alone: dict[str, Any] = {}
    _nest(alone, key, value)
    try:
        OmegaConf.merge(OmegaConf.structured(schema), alone)
    except (OmegaConfBaseException, ValueError, TypeError, RecursionError):
        return False
    return True


def _at(values: dict[str, Any], key: str) -> Any:
    value: Any = values
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else value
    return value


def _check_values(config: Any, prefix: str) -> None:
    for entry in fields(config):
        name, value = prefix + entry.name, getattr(config, entry.name)
        if is_dataclass(value):
            _check_values(value, f"{name}.")
            continue
        choices = entry.metadata.get("choices")
        low, high = entry.metadata.get("low"), entry.metadata.get("high")
        if choices and value not in choices:
            close = difflib.get_close_matches(str(value).lower(), choices, 1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise ConfigError(f"{name}: expected one of {', '.join(choices)}, got {cut(value)}{hint}")
        if isinstance(value, int) and value.bit_length() > 64:
            raise ConfigError(f"{name}: a whole number of more than 64 bits; give a smaller one.")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise ConfigError(f"{name}: expected a finite number, got {value}.")
            if low is not None and value < low:
                raise ConfigError(f"{name}: expected at least {low}, got {value}.")
            if high is not None and value > high:
                raise ConfigError(f"{name}: expected at most {high}, got {value}.")


def cut(value: Any) -> str:
    """A value as a message shows it: never longer than a line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def differences(before: Any, after: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The keys in which two configurations of one schema differ, with both values."""
    found: dict[str, tuple[Any, Any]] = {}
    for entry in fields(before):
        old, new = getattr(before, entry.name), getattr(after, entry.name)
        if is_dataclass(old):
            found |= differences(old, new, f"{prefix}{entry.name}.")
        elif old != new:
            found[prefix + entry.name] = (old, new)
    return found


def from_mapping(schema: type[Schema], values: dict[str, Any] | DictConfig, source: str = "options") -> Schema:
    """A configuration from a mapping in memory, with the same checks as from a file."""
    plain = OmegaConf.to_container(values) if isinstance(values, DictConfig) else values
    return build(schema, [(typing.cast(dict[str, Any], plain), source)])
