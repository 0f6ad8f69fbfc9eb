"""Families of tasks: what a policy is trained on, and what it is judged on without having seen it."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssdkd.config import RunConfig, build, option, read_yaml
from ssdkd.errors import ConfigError
from ssdkd.files import expanded

Task = dict[str, Any]


@dataclass
class TasksConfig:
    """A family: every task is a mapping over `base` and `common`, of whatever a run's configuration holds."""

    base: str = option("digits", "ready-made config, or YAML, that every task is laid over")
    common: dict[str, Any] = option({}, "what all tasks share, over base")
    tasks: list[dict[str, Any]] = option([], "tasks to train on")
    axes: dict[str, Any] = option({}, "more of them: name -> list of mappings; one of each list makes a task")
    held_out: list[dict[str, Any]] = option([], "tasks to be judged on, never trained on")
    teachers_root: str | None = option(None, "folder of the teachers and images that are named by a relative path")


def training_tasks(family: TasksConfig) -> list[Task]:
    """The tasks listed and those that the axes span; the base alone where there are neither."""
    spanned: list[Task] = []
    if family.axes:
        for name, choices in family.axes.items():
            if not isinstance(choices, list) or not choices or not all(isinstance(c, dict) for c in choices):
                raise ConfigError(f"axes.{name}: expected a list of mappings, got {str(choices)[:60]!r}.")
        spanned = [merged(*choice) for choice in itertools.product(*family.axes.values())]
    return _ready(family, [*family.tasks, *spanned] or [{}])


def held_out_tasks(family: TasksConfig) -> list[Task]:
    """Those to be judged on; the training tasks where none are held out."""
    return _ready(family, family.held_out) if family.held_out else training_tasks(family)


def merged(*layers: Task) -> Task:
    """Mappings over each other, later ones winning; a model's `arguments` are replaced as a whole."""
    result: Task = {}
    for layer in layers:
        for key, value in layer.items():
            below = result.get(key)
            if isinstance(value, dict) and isinstance(below, dict) and key != "arguments":
                value = merged(below, value)
            result[key] = value
    return result


def name_of(task: Task) -> str:
    """A task in one short line: the settings by which it differs."""
    parts: list[str] = []

    def walk(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for inner, content in value.items():
                if inner not in ("terms", "threads", "image", "data_root"):  # long, and not what a task is known by
                    walk(content, inner)
        elif key == "checkpoint":
            parts.append(Path(str(value)).stem)
        else:
            parts.append(f"{key}={'-'.join(map(str, value)) if isinstance(value, list) else value}")

    walk(task, "")
    return " ".join(parts) or "base"


def _ready(family: TasksConfig, tasks: Sequence[Task]) -> list[Task]:
    """Whole tasks, their teachers found, each checked against the schema before hours are spent."""
    base, root = read_yaml(family.base), expanded(family.teachers_root or ".")
    ready: list[Task] = []
    fit: set[str] = set()
    for task in tasks:
        whole = merged(family.common, task)
        teacher = whole.get("teacher")
        file = teacher.get("checkpoint") if isinstance(teacher, dict) else None
        if isinstance(teacher, dict) and isinstance(file, str) and file != "embedded":
            path = root / expanded(file)
            if not path.is_file():
                raise ConfigError(
                    f"teacher {path} of a task does not exist; make the digits family's with "
                    "python -m benchmarks.make_family --out FOLDER, then give --teachers-root FOLDER."
                )
            whole = merged(whole, {"teacher": {"checkpoint": str(path.resolve())}})
        images = whole.get("data_root")
        if isinstance(images, str):
            whole["data_root"] = str((root / expanded(images)).resolve())
        settings = set(_settings(whole))
        if not settings <= fit:  # each is allowed or not whatever the others are, so the tasks that axes span add few
            build(RunConfig, [base, (whole, "a task of the family")])
            fit |= settings
        ready.append(whole)
    return ready


def _settings(task: Task, within: str = "") -> Iterator[str]:
    for key, value in task.items():
        if isinstance(value, dict) and value:
            yield from _settings(value, f"{within}{key}.")
        else:
            yield f"{within}{key}={value!r}"


def digest_of(name_or_file: str) -> str:
    """Of the tasks that a family's YAML trains on, wherever its teachers lie."""
    trained_on = {k: v for k, v in read_yaml(name_or_file)[0].items() if k not in ("held_out", "teachers_root")}
    return hashlib.sha256(json.dumps(trained_on, sort_keys=True, default=str).encode()).hexdigest()


def family_from(name_or_file: str, teachers_root: str | None = None) -> TasksConfig:
    """A family's YAML by name or path, its teachers looked for in `teachers_root` if given."""
    family = build(TasksConfig, [read_yaml(name_or_file)])
    if teachers_root is not None:
        family.teachers_root = teachers_root
    return family
