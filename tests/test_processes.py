"""Workers end with the process that started them, however that ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from agents.processes import pool
from ssdkd.errors import SsdkdError

STARTER = """
import os, signal, sys, time
from agents.processes import pool
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background ignore Ctrl-C
if __name__ == "__main__":
    with pool(1) as workers:
        print(workers.submit(os.getpid).result(), flush=True)
        time.sleep(60)
"""


def is_there(process: int) -> bool:
    """Whether it runs, and is no zombie that nobody has asked after yet."""
    status = Path(f"/proc/{process}/status")
    return status.exists() and "\nState:\tZ" not in status.read_text()


def test_each_worker_has_one_thread() -> None:
    with pool(1) as workers:
        assert workers.submit(torch.get_num_threads).result() == 1


def test_a_worker_ends_when_the_process_that_started_it_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "starter.py"
    script.write_text(STARTER)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        worker = int(starter.stdout.readline())
        assert is_there(worker)
        starter.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20.0
    while is_there(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_there(worker)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_is_left_to_the_process_that_started_the_workers_and_ends_them_with_it(tmp_path: Path) -> None:
    with pool(1) as workers:
        worker = workers.submit(os.getpid).result()
        os.kill(worker, signal.SIGINT)
        assert workers.submit(os.getpid).result() == worker
    script = tmp_path / "starter.py"
    work = "list(workers.map(time.sleep, [0.5] * 400))"
    script.write_text(STARTER.replace("time.sleep(60)", work).replace("pool(1)", "pool(2)"))
    told: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, str(script)], **told) as starter:
        assert starter.stdout is not None
        worker = int(starter.stdout.readline())
        time.sleep(1.2)  # into the work
        began = time.monotonic()
        starter.send_signal(signal.SIGINT)
        said = starter.communicate(timeout=20.0)[1]
    assert time.monotonic() - began < 20.0
    assert not is_there(worker)
    assert said.rstrip().endswith("KeyboardInterrupt")
    assert "InvalidStateError" not in said, "of work that was called off while a worker died"


def test_a_worker_that_ends_before_its_work_is_one_sentence() -> None:
    with pytest.raises(SsdkdError, match="a process that worked beside others has ended"), pool(1) as workers:
        list(workers.map(os._exit, [1]))
