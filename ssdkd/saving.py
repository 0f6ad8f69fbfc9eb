"""When a run saves and how it stops: the checkpoint interval, the signals, and what is said about them."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any

from ssdkd import checkpoint
from ssdkd.config import CheckpointConfig
from ssdkd.errors import CheckpointError, run_command
from ssdkd.tracking.display import Display
from ssdkd.tracking.folder import CHECKPOINTS, RunFolder


class Stopped(Exception):
    """What was running ended early by a signal, after its round."""

    def __init__(self, number: int, what_now: str) -> None:
        """`what_now` ends the sentence: what is saved, and how it goes on."""
        super().__init__(f"stopped by {signal.Signals(number).name}; {what_now}")
        self.exit_code = 128 + number


class StoppedAtOnce(KeyboardInterrupt):
    """The user asked a second time: not even the round is finished."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped at once by a second {signal.Signals(number).name}")
        self.exit_code = 128 + number


def run_until_stopped(run: Callable[[Sequence[str] | None], object], argv: Sequence[str] | None) -> int:
    """Run what a command is made of: -> its exit code, or that of the signal that ended it; says how to go on."""
    try:
        return run_command(run, argv)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    except StoppedAtOnce as stopped:
        print(f"{stopped}; --resume goes on from the last checkpoint", file=sys.stderr)
        return stopped.exit_code


class StopSignals:
    """While it is entered, SIGINT and SIGTERM ask the run to stop after this round, SIGUSR1 to save.

    A second SIGINT or SIGTERM leaves at once. Outside the main thread signals stay as they are.
    """

    def __init__(self) -> None:
        self.stop = 0
        self.save = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        handlers: dict[str, Callable[[int, FrameType | None], None]] = {
            "SIGINT": self._ask_to_stop,
            "SIGTERM": self._ask_to_stop,
            "SIGUSR1": self._ask_to_save,
        }
        for name, handler in handlers.items():
            number = getattr(signal, name, None)  # Windows has no SIGUSR1
            if number is None:
                continue
            try:
                self._before[number] = signal.signal(number, handler)
            except ValueError:  # not the main thread
                return self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        if self.stop:
            raise StoppedAtOnce(number)
        self.stop = number

    def _ask_to_save(self, number: int, frame: FrameType | None) -> None:
        self.save = True


class Saver:
    """Writes checkpoints into the run folder when they are due; without a folder it does nothing."""

    def __init__(
        self, settings: CheckpointConfig, folder: RunFolder | None, display: Display, in_memory: bool = False
    ) -> None:
        """`in_memory`: the networks were handed over, so that no command can build them."""
        self.settings = settings
        self.folder = folder.path if folder is not None else None
        self.display = display
        self.in_memory = in_memory
        self.saved: int | None = None  # round of the newest checkpoint
        self._last = time.monotonic()

    def is_due(self, round_index: int) -> bool:
        """Whether as many rounds or minutes as were asked for have gone by."""
        rounds, minutes = self.settings.rounds, self.settings.minutes
        by_rounds = rounds > 0 and round_index % rounds == 0
        by_time = minutes > 0 and time.monotonic() - self._last >= 60.0 * minutes
        return by_rounds or by_time

    def save(self, state: dict[str, Any], round_index: int) -> None:
        """Write one; where the disk refuses, go on or stop as configured, the older ones untouched."""
        if self.folder is None:
            return
        self._last = time.monotonic()
        try:
            checkpoint.save(self.folder / CHECKPOINTS, state, round_index, self.settings.keep)
            self.saved = round_index
        except CheckpointError as error:
            if self.settings.on_error == "stop":
                raise CheckpointError(f"{str(error).rstrip('.')}; {self.how_to_go_on()}") from error
            self.display.warn(f"{error} The run goes on; the next checkpoint is tried when it is due.")

    def how_to_go_on(self) -> str:
        """The end of a sentence about the run, where it is cut off now."""
        if self.folder is None:
            return "nothing was saved"
        if self.saved is None:
            return "there is no checkpoint to go on from"
        command = f"python -m ssdkd.run --resume {self.folder}"
        if self.in_memory:
            command = f"ssdkd.distill(teacher, student, resume={str(self.folder)!r})"
        return f"the run is saved as of round {self.saved} and goes on with: {command}"
