"""Processes that work side by side, one thread each, and end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from ssdkd.errors import SsdkdError


@contextmanager
def pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """So many worker processes; what they are given must be importable.

    An error ends them when they have done what they are at, Ctrl-C at once.

    Raises:
        SsdkdError: one of them has ended before its work.
    """
    context = multiprocessing.get_context("spawn")  # a forked PyTorch may hang
    with ProcessPoolExecutor(processes, context, _begin) as workers:
        try:
            yield workers
        except BrokenProcessPool as error:
            raise SsdkdError(
                "a process that worked beside others has ended, perhaps for lack of memory; ask for fewer at once."
            ) from error
        except BaseException as error:
            running = list(workers._processes.values())
            workers.shutdown(wait=False, cancel_futures=True)  # else it would first do all that it was given
            if isinstance(error, KeyboardInterrupt):
                time.sleep(0.1)  # till then: some Pythons stumble over cancelled work when a worker dies
                for process in running:
                    process.kill()
            raise


def each_of(jobs: Sequence[tuple[Any, ...]], play: Callable[..., Any], processes: int) -> Iterator[Any]:
    """What `play` makes of each job, in their order, as soon as it and all before it have ended; some at once."""
    at_once = min(processes, len(jobs))
    with pool(at_once) if at_once > 1 else nullcontext() as workers:
        yield from (workers.map if workers else map)(play, *zip(*jobs, strict=True)) if jobs else ()


def _begin() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one decides
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker would wait for ever for another task from a process that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
