"""The errors that ssdkd raises on purpose; the commands print them as one sentence and exit with their code."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


class SsdkdError(Exception):
    """A mistake in what the user gave (a file, a name, a value): says what is wrong, where, and what to do."""

    exit_code = 2


class ConfigError(SsdkdError):
    """A configuration that cannot be run: unknown key, wrong type, impossible combination."""


class CheckpointError(SsdkdError):
    """A weights, policy or run file that is missing, damaged, of another model, or not safe to read."""


class DataError(SsdkdError):
    """An evaluation set that is missing, damaged, or does not fit the teacher."""


class NumericalError(SsdkdError):
    """Training left the finite numbers and could not be brought back."""

    exit_code = 3


class Parser(argparse.ArgumentParser):
    """Its refusals are sentences like all others, and an option has one name."""

    def __init__(self, prog: str, description: str | None = None, **more: Any) -> None:
        """Of `description`, such as a module's own, the first line is shown."""
        super().__init__(prog, description=(description or "").partition("\n")[0], allow_abbrev=False, **more)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        args = list(sys.argv[1:] if args is None else args)
        for flag, _, value in (word.partition("=") for word in args):
            if flag.startswith("--") and value == "--":  # of which older Pythons make an empty list
                self.error(f"{flag.replace('_', '-')}: -- is no value")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help.")


def first_line(error: BaseException) -> str:
    """What another library's error says, or else its kind, as a part of a sentence."""
    plain = re.sub("\x1b\\[[0-9;]*m", "", str(error))  # some are in colour
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    return (lines[0][:300] if lines else type(error).__name__).rstrip(".:")


def in_short(error: BaseException) -> str:
    """All of what an error says, or else its kind, as a part of a sentence: it may quote from a file, whole lines."""
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def in_one_line(error: BaseException) -> str:
    """The kind of error and the first line of its message."""
    kind = type(error).__name__
    return f"{kind}: {first_line(error)}" if str(error).strip() else kind


def run_command(
    run: Callable[[Sequence[str] | None], object], argv: Sequence[str] | None, stopped: str | None = None
) -> int:
    """Run what a command is made of: -> its exit code; a user's mistake is one sentence and a code of its own.

    `stopped` is what Ctrl-C is answered with, if it is an end like any other.
    """
    try:
        run(argv)
    except SsdkdError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if stopped is None:
            raise
        print(stopped, file=sys.stderr)
        return 130
    return 0
