"""Promises of the configuration: what does not fit is refused by name, what fits survives a round trip."""

import argparse
import re
import typing
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import ssdkd
from ssdkd.config import RunConfig, build, from_mapping, option, parse_command_line, read_yaml, to_yaml
from ssdkd.errors import ConfigError

ROOT = Path(ssdkd.__file__).resolve().parent.parent
READY_MADE = sorted((ROOT / "configs").glob("*.yaml"))
FOR_A_RUN = [p for p in READY_MADE if "python -m agents" not in p.read_text(encoding="utf-8")]


def read(*argv: str, extra: Any = ()) -> RunConfig:
    return parse_command_line(RunConfig, argv, prog="ssdkd", description="Distil.", extra=extra)[0]


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(*argv)
    message = str(caught.value)
    assert "\n" not in message, "a refusal is one sentence"
    return message


def refused_file(folder: Path, text: str) -> str:
    file = folder / "job.yaml"
    file.write_text(text, encoding="utf-8")
    return refusal("--config", str(file))


def leaves(schema: type = RunConfig, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Every setting: its dotted name, default, and declared meaning."""
    found, hints = [], typing.get_type_hints(schema)
    for entry in fields(schema):
        if is_dataclass(hints[entry.name]):
            found += leaves(hints[entry.name], f"{prefix}{entry.name}.")
        else:
            default = entry.default if entry.default is not MISSING else entry.default_factory()
            found.append((prefix + entry.name, default, entry.metadata["meaning"]))
    return found


# -- unknown keys ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "unknown", "nearest"),
    [
        ("sed: 1", "sed", "seed"),
        ("inversion: {stepz: 3}", "inversion.stepz", "inversion.steps"),
        ("distilation: {steps: 3}", "distilation", "distillation"),
        ("buffer: {capacty: 5}", "buffer.capacty", "buffer.capacity"),
    ],
)
def test_an_unknown_key_in_a_file_is_named_with_the_nearest_known_one(
    tmp_path: Path, text: str, unknown: str, nearest: str
) -> None:
    message = refused_file(tmp_path, text)
    assert f"unknown key {unknown} " in message
    assert f"did you mean {nearest}?" in message
    assert "job.yaml" in message


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("--inversion.stps", "--inversion.steps"),
        ("--sede", "--seed"),
        ("--distillation.learning_rat", "--distillation.learning-rate"),
        ("--capacity", "--buffer.capacity"),
    ],
)
def test_an_unknown_flag_is_named_with_the_nearest_known_one(flag: str, nearest: str) -> None:
    for argv in ((flag, "3"), (f"{flag}=3",)):
        message = refusal(*argv)
        assert f"did you mean {nearest}?" in message


def test_a_key_like_no_other_is_refused_without_a_guess(tmp_path: Path) -> None:
    assert "did you mean" not in refused_file(tmp_path, "qqqqqq: 1")
    assert "unknown option" in refusal("--qqqqqq", "1")
    assert "stray" in refusal("stray")


@pytest.mark.parametrize(("job", "command"), [("train-digits", "agents.train"), ("family", "agents.evaluate")])
def test_a_job_of_another_command_is_told_by_its_command(job: str, command: str) -> None:
    assert refusal("--config", job).endswith(f"{job}.yaml; it is a key of python -m {command}.")


def test_keys_that_are_not_words_are_refused(tmp_path: Path) -> None:
    assert "unknown key 1" in refused_file(tmp_path, "1: 2")


# -- wrong types ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "expected", "got"),
    [
        ("seed: soon", "seed", "whole number", "soon"),
        ("seed: 1.5", "seed", "whole number", "1.5"),
        ("seed: true", "seed", "whole number", "True"),
        ("seed: [1]", "seed", "whole number", "[1]"),
        ("inversion: {latent_rate: fast}", "inversion.latent_rate", "number", "fast"),
        ("buffer: {fresh: maybe}", "buffer.fresh", "true or false", "maybe"),
        ("image: {mean: 0.3}", "image.mean", "list of numbers", "0.3"),
        ("image: {mean: [a]}", "image.mean", "list of numbers", "['a']"),
        ("inversion: {terms: 5}", "inversion.terms", "mapping", "5"),
        ("inversion: {terms: {one_hot: strong}}", "inversion.terms", "mapping of names to numbers", "strong"),
        ("inversion: {terms: {one_hot: true}}", "inversion.terms", "mapping of names to numbers", "True"),
        ("inversion: 3", "inversion", "mapping", "3"),
        ("inversion:", "inversion", "mapping", "None"),
        ("out: [a]", "out", "text", "['a']"),
    ],
)
def test_a_wrong_type_is_refused_by_key_with_what_was_expected_and_what_came(
    tmp_path: Path, text: str, key: str, expected: str, got: str
) -> None:
    message = refused_file(tmp_path, text)
    assert message.startswith(f"{key} in ")
    assert "job.yaml" in message
    assert f"expected {expected}" in message or f"expected a {expected}" in message
    assert got in message.split("got", 1)[1]


def test_a_wrong_type_on_the_command_line_is_refused_the_same_way() -> None:
    assert refusal("--seed", "soon") == "seed in the command line: expected whole number, got 'soon'."
    assert "--seed" in refusal("--seed")


@dataclass
class Lists:
    names: list[str] | None = option(None, "which")
    sizes: list[int] = option([], "how large")
    parts: list[dict[str, Any]] = option([], "what of")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"names": "progress"}, "names in options: expected list of names, got 'progress'."),
        ({"sizes": [0.5]}, "sizes in options: expected list of whole numbers, got [0.5]."),
        ({"parts": [3]}, "parts in options: expected list of mappings, got [3]."),
    ],
)
def test_a_list_is_called_by_what_it_is_of(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(expected)}$"):
        from_mapping(Lists, values)


@pytest.mark.parametrize("text", ["teacher: {arguments: [1]}", "inversion: {terms: [1]}"])
def test_a_list_where_a_mapping_was_expected_is_refused_by_key(tmp_path: Path, text: str) -> None:
    message = refused_file(tmp_path, text)
    assert "expected mapping" in message
    assert "arguments" in message or "terms" in message


@pytest.mark.parametrize(
    ("text", "kind"), [("- a\n- b\n", "list"), ("just words", "str"), ("3", "int"), ("[1, 2]", "list")]
)
def test_a_file_that_is_not_a_mapping_is_refused(tmp_path: Path, text: str, kind: str) -> None:
    message = refused_file(tmp_path, text)
    assert "job.yaml" in message
    assert f"holds a {kind}" in message


# -- hostile and broken files ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{target}']]",
        "!!python/object/apply:os.system ['touch {target}']",
        "!!python/object/new:os.system ['touch {target}']",
        "!!python/name:os.system",
    ],
)
def test_python_in_yaml_is_refused_and_does_not_run(tmp_path: Path, value: str) -> None:
    target = tmp_path / "ran"
    planted = value.replace("{target}", str(target))
    assert "cannot be read" in refused_file(tmp_path, f"seed: {planted}\n")
    assert "cannot be read" in refusal("--inversion.terms", planted)
    assert not target.exists()


@pytest.mark.parametrize(
    "data",
    [b"seed: [1", b"\tseed: 1", b"\xff\xfe\x00", b"seed: 1\n  x: 2", b"a: &b [*c]", b"a: !" + b"9" * 5000],
    ids=["list", "tab", "bytes", "indent", "alias", "tag"],
)
def test_a_file_that_is_no_yaml_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "broken.yaml"
    file.write_bytes(data)
    message = refusal("--config", str(file))
    assert str(file) in message
    assert "cannot be read as YAML" in message
    assert len(message) < 1000


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("# nothing yet\n")
    assert read("--config", str(file)) == RunConfig()


def test_a_config_that_does_not_exist_is_refused_by_name() -> None:
    assert "no_such_job" in refusal("--config", "no_such_job")
    assert "no/such/file.yaml" in refusal("--config", "no/such/file.yaml")


@pytest.mark.parametrize("value", ["2001-99-99", "[" * 5000], ids=["no-date", "deep"])
def test_a_value_that_the_reader_chokes_on_is_refused(value: str) -> None:
    assert "--seed" in refusal("--seed", value)


@pytest.mark.parametrize("flag", ["--seed", "--config", "--distillation.learning-rate"])
def test_two_dashes_are_no_value(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"^{flag}: -- is no value; see "):
        read(f"{flag}=--")
    assert read("--out=a=--").out == "a=--"


@given(st.sampled_from(["seed", "minutes", "image.mean", "inversion.terms", "compile", "out"]), st.text())
@settings(max_examples=80, deadline=None)
def test_no_value_whatever_gives_more_than_a_refusal(key: str, text: str) -> None:
    try:
        config = read(f"--{key}={text}")
    except ConfigError:
        return
    assert isinstance(config, RunConfig)


# -- choices and ranges ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "wrong", "nearest"),
    [
        ("--policy", "unifrom", "uniform"),
        ("--inversion.meta", "reptil", "reptile"),
        ("--distillation.optimizer", "adamww", "adamw"),
    ],
)
def test_a_wrong_choice_is_refused_with_all_choices_and_the_nearest(flag: str, wrong: str, nearest: str) -> None:
    message = refusal(flag, wrong)
    assert message.startswith(flag.lstrip("-"))
    assert repr(wrong) in message
    assert f"did you mean {nearest}?" in message
    assert "expected one of" in message


@pytest.mark.parametrize(
    ("flag", "value", "least"),
    [
        ("--inversion.steps", "0", "1"),
        ("--seed", "-1", "0"),
        ("--distillation.learning-rate", "-0.1", "0"),
        ("--distillation.temperature", "0", "0.001"),
        ("--image.classes", "1", "2"),
        ("--rounds", "0", "1"),
    ],
)
def test_a_value_below_its_range_is_refused(flag: str, value: str, least: str) -> None:
    message = refusal(flag, value)
    assert message.startswith(flag[2:].replace("-", "_"))
    assert f"at least {least}" in message


@pytest.mark.parametrize("flag", ["--inversion.images", "--probe.images"])
def test_images_that_a_run_would_never_have_made_are_refused(flag: str) -> None:
    assert refusal(flag, str(10**12)) == f"{flag[2:]}: expected at most 1000000, got {10**12}."


@pytest.mark.parametrize("value", [".nan", ".inf"])
def test_a_number_that_is_not_finite_is_refused(value: str) -> None:
    assert refusal("--distillation.learning-rate", value).startswith(
        "distillation.learning_rate: expected a finite number"
    )


@pytest.mark.parametrize("key", ["seed", "minutes", "distillation.learning_rate", "teacher.arguments.width"])
def test_an_integer_beyond_all_sizes_is_refused_by_key(key: str) -> None:
    *groups, name = key.split(".")
    for many in (10**400, -(10**5000)):
        values: dict[str, Any] = {name: many}
        for group in reversed(groups):
            values = {group: values}
        with pytest.raises(ConfigError, match=f"^{key} in options: a whole number of more than 64 bits"):
            from_mapping(RunConfig, values)
    assert refusal("--seed", f"'{10**400}'").startswith("seed: a whole number of more than 64 bits")


def test_numbers_of_numpy_are_numbers() -> None:
    given = {
        "seed": np.int64(3),
        "buffer": {"fresh": np.bool_(True)},
        "image": {"mean": (np.float32(0.5),), "std": np.ones(1)},
    }
    config = from_mapping(RunConfig, given)
    assert (config.seed, config.buffer.fresh, config.image.mean) == (3, True, [0.5])
    assert from_mapping(RunConfig, {"distillation": {"temperature": np.float32(0.1)}}).distillation.temperature > 0.0999


def test_null_is_allowed_exactly_where_the_default_is_null() -> None:
    assert read("--rounds", "5", "--rounds", "null").rounds is None
    assert "seed" in refusal("--seed", "null")


# -- layers and spelling --------------------------------------------------------------------------------


def test_a_later_layer_wins_and_the_rest_stays(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("seed: 3\nrounds: 7\ninversion: {steps: 9, images: 50}\n")
    config = read("--config", str(file), "--seed", "4", "--inversion.images", "60")
    assert (config.seed, config.rounds) == (4, 7)
    assert (config.inversion.steps, config.inversion.images) == (9, 60)
    assert config.buffer == RunConfig().buffer
    layers = [({"seed": 1, "threads": 1}, "first"), ({"seed": 2}, "second")]
    assert (build(RunConfig, layers).seed, build(RunConfig, layers).threads) == (2, 1)


def test_a_refusal_names_the_layer_it_came_from() -> None:
    with pytest.raises(ConfigError, match="in second"):
        build(RunConfig, [({"seed": 1}, "first"), ({"seed": "x"}, "second")])


def test_dashes_and_underscores_are_the_same_in_flags() -> None:
    dashed = read("--distillation.learning-rate", "0.3", "--data-root=my-folder_x")
    assert dashed == read("--distillation.learning_rate", "0.3", "--data_root=my-folder_x")
    assert dashed.distillation.learning_rate == 0.3
    assert dashed.data_root == "my-folder_x", "the value is left as it was typed"


def test_flags_are_typed_as_yaml_is() -> None:
    config = read(
        *("--image.mean", "[0.1, 0.2]", "--inversion.terms", "{one_hot: 2}", "--buffer.fresh"),
        *("--distillation.learning-rate", "1e-3", "--out", "2024", "--teacher.arguments", "{widths: [4, 8]}"),
    )
    assert config.image.mean == [0.1, 0.2]
    assert config.inversion.terms == {"one_hot": 2.0}
    assert config.buffer.fresh is True
    assert config.distillation.learning_rate == 1e-3
    assert config.out == "2024"
    assert config.teacher.arguments == {"widths": [4, 8]}
    assert read("--buffer.fresh", "false").buffer.fresh is False


def test_a_number_on_the_command_line_is_what_it_looks_like() -> None:
    assert [read("--seed", seed).seed for seed in ("008", "009", "010", "-0")] == [8, 9, 10, 0]
    assert read("--minutes", "010").minutes == 10.0
    assert read("--distillation.learning-rate", "00.5").distillation.learning_rate == 0.5
    assert refusal("--minutes", "1:30") == "minutes in the command line: expected number, got '1:30'."


def test_a_switch_with_an_automatic_choice_takes_true_for_on_and_false_for_off(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    told = {"on": "on", "true": "on", "True": "on", "off": "off", "false": "off", "auto": "auto", "'on'": "on"}
    for word, meant in told.items():
        file.write_text(f"compile: {word}\n")
        assert read("--config", str(file)).compile == meant
        assert read("--compile", word.strip("'")).compile == meant
    assert read().compile == "auto"
    assert read("--compile").compile == "on"
    assert build(RunConfig, [({"compile": True}, "options")]).compile == "on"
    assert refusal("--compile", "maybe") == "compile: expected one of auto, on, off, got 'maybe'."


def test_flags_outside_the_schema_are_handed_back() -> None:
    config, given_flags = parse_command_line(
        RunConfig,
        ["--resume-from", "runs/1", "--quiet", "--seed", "2"],
        prog="ssdkd",
        description="",
        extra=[("resume_from", "a run to go on with", None), ("quiet", "say little", False)],
    )
    assert isinstance(given_flags, argparse.Namespace)
    assert (given_flags.resume_from, given_flags.quiet, config.seed) == ("runs/1", True, 2)


def test_the_default_config_is_read_when_none_is_given(tmp_path: Path) -> None:
    usual, other = tmp_path / "usual.yaml", tmp_path / "other.yaml"
    usual.write_text("seed: 11\n")
    other.write_text("threads: 2\n")
    made = {
        argv: parse_command_line(RunConfig, list(argv), prog="x", description="", default_config=str(usual))[0]
        for argv in ((), ("--config", str(other)))
    }
    assert (made[()].seed, made[()].threads) == (11, 0)
    assert (made[("--config", str(other))].seed, made[("--config", str(other))].threads) == (0, 2)


def test_two_configurations_share_nothing() -> None:
    one, two = read(), read()
    one.teacher.arguments["widths"] = [1]
    one.inversion.steps = 77
    assert two == RunConfig()


# -- help and round trips -------------------------------------------------------------------------------


def test_help_lists_every_setting_with_meaning_and_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit) as ended:
        read("--help")
    assert ended.value.code == 0
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    listed = leaves()
    assert len(listed) > 40
    for name, default, meaning in listed:
        told = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
        flag = re.escape(f"--{name.replace('_', '-')} ")
        described = re.escape(f"{meaning} (default: {told})")
        assert re.search(rf"{flag}[^-]*? {described}", shown), name


AWKWARD: list[dict[str, Any]] = [
    {},
    {"seed": 3, "rounds": 50, "minutes": 0.25, "compile": True, "policy": "uniform", "data_root": "~/d"},
    {"out": "no", "data_root": "null", "dataset": "1e3", "teacher": {"checkpoint": "a: b # c"}},
    {"out": "ünï cödé", "device": "cuda:1", "teacher": {"name": "2024"}},
    {"image": {"mean": [0.1, 1e-7], "std": [1.0, 3.0], "flip": False, "channels": 2}},
    {"inversion": {"terms": {"one_hot": 1e-5, "balance": 2.0}, "latent_rate": 1e-12}},
    {"teacher": {"arguments": {"widths": [1, 2], "deep": {"x": None, "y": "yes"}, "rate": 1e-05}}},
]


@pytest.mark.parametrize("values", AWKWARD)
def test_what_print_config_prints_reads_back_as_the_same_configuration(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given_file, printed = tmp_path / "given.yaml", tmp_path / "printed.yaml"
    given_file.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        read("--config", str(given_file), "--print-config")
    assert ended.value.code == 0
    printed.write_text(capsys.readouterr().out, encoding="utf-8")
    config = read("--config", str(printed))
    assert config == from_mapping(RunConfig, values)
    assert values == {} or config != RunConfig()


@given(
    st.floats(0, 1e9),
    st.integers(0, 2**31),
    st.text(st.characters(codec="utf-8", categories=["L", "N", "P"])),
)
@settings(max_examples=40, deadline=None)
def test_any_value_survives_yaml(rate: float, seed: int, out: str) -> None:
    if "${" in out or out == "???":
        return
    values = {"seed": seed, "out": out, "distillation": {"learning_rate": rate}}
    config = from_mapping(RunConfig, values)
    assert from_mapping(RunConfig, yaml.safe_load(to_yaml(config))) == config
    assert (config.seed, config.out, config.distillation.learning_rate) == (seed, out, rate)


@pytest.mark.parametrize("file", FOR_A_RUN, ids=lambda p: p.stem)
def test_every_ready_made_config_loads_by_name(file: Path) -> None:
    values, source = read_yaml(file.stem)
    assert Path(source).resolve() == file.resolve()
    assert read("--config", file.stem) == from_mapping(RunConfig, values)
    assert values, "a ready-made config should set something"


@pytest.mark.parametrize("file", READY_MADE, ids=lambda p: p.stem)
def test_every_ready_made_config_opens_with_the_command_that_runs_it(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    opening = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    assert any("python -m" in line for line in opening)
