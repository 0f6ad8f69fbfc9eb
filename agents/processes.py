"""Processes that work side by side, one thread each, and end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

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
            if isinstance(error, KeyboardInterrupt):
                for process in list(workers._processes.values()):
                    process.kill()
            workers.shutdown(wait=False, cancel_futures=True)  # else it would first do all that it was given
            raise


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
