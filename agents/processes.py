"""Processes that work side by side, one thread each, and end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor

import torch


def pool(processes: int) -> ProcessPoolExecutor:
    """So many worker processes; what they are given must be importable."""
    context = multiprocessing.get_context("spawn")  # a forked PyTorch may hang
    return ProcessPoolExecutor(processes, context, _begin)


def _begin() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker would wait for ever for another task from a process that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
