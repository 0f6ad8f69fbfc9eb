"""What the benchmarks ask of their options: a mistake is one sentence, before the work."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Collection, Mapping, Sequence

from ssdkd.errors import ConfigError


def require_at_least(given: argparse.Namespace, **least: float) -> None:
    """Refuse an option below what its name stands for here."""
    for name, low in least.items():
        if not getattr(given, name) >= low:  # nan is not
            raise ConfigError(f"--{name.replace('_', '-')}: at least {low:g}.")


def require_installed(module: str, package: str) -> None:
    """Refuse to begin without what a benchmark needs beside ssdkd."""
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"this needs {package}, which is not installed: pip install -e '.[bench]'.")


def refuse_own(options: Sequence[str], own: Mapping[str, str]) -> None:
    """Refuse what is passed on to every run though each run has a value of its own: option -> what says so."""
    for name in (option.partition("=")[0] for option in options):
        if name in own:
            raise ConfigError(f"{name}: every run has its own; give {own[name]}.")


def names_in(text: str, known: Collection[str], option: str) -> list[str]:
    """Comma-separated names, all of them known; none in an empty text."""
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in known:
            raise ConfigError(f"{option}: {name!r} is none of {', '.join(known)}.")
    return names


def numbers_in(text: str, option: str, least: int = 1) -> list[int]:
    """Comma-separated whole numbers; none in an empty text."""
    numbers = [int(part) if part.strip().isdecimal() else -1 for part in text.split(",") if part]
    if any(number < least for number in numbers):
        raise ConfigError(f"{option}: expected whole numbers from {least} on, comma-separated, got {text[:60]!r}.")
    return numbers
