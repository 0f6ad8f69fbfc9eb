"""What real digits would have given the default job's student: how far the data-free one is from that.

    python -m benchmarks.real_digits [--seeds 8]            # some five minutes on one core

The same network, trained on real digits with their labels: on all 1,437 that its teacher saw, and on as many as the job
keeps synthetic ones, drawn anew for each seed. Each time in as many steps of the same batch as the job is long, with
the shifts that its images have.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence

import torch

from benchmarks.arguments import require_at_least
from benchmarks.make_digits import as_set, share_right, split
from ssdkd.build import build_student
from ssdkd.config import RunConfig, build, read_yaml
from ssdkd.errors import Parser, run_command
from ssdkd.teacher import TeacherTraining, train


def trained_on_real(job: RunConfig, count: int | None, seed: int) -> float:
    """Accuracy in percent on the 360 test digits, of the job's student trained on `count` real ones or on all."""
    images, test_images, labels, test_labels = split()
    if count is not None:
        from sklearn.model_selection import train_test_split

        images, _, labels, _ = train_test_split(images, labels, train_size=count, random_state=seed, stratify=labels)
    learning = job.distillation
    options = TeacherTraining(
        epochs=round((job.rounds or 0) * learning.steps / (len(labels) // learning.batch)),
        batch=learning.batch,
        learning_rate=learning.learning_rate,
        shift=job.buffer.shift or 0,
        seed=seed,
    )
    torch.manual_seed(seed)
    known = as_set(images, labels)
    student = build_student(job, known.spec)
    train(student, known, options, torch.device("cpu"))
    return share_right(student, as_set(test_images, test_labels))


def run(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m benchmarks.real_digits", description=__doc__)
    parser.add_argument("--seeds", type=int, default=8, help="how many, from 0 on")
    given = parser.parse_args(argv)
    require_at_least(given, seeds=1)
    torch.set_num_threads(1)
    job = build(RunConfig, [read_yaml("digits")])
    for count in (None, job.buffer.capacity):
        found = [trained_on_real(job, count, seed) for seed in range(given.seeds)]
        shown = ", ".join(f"{right:.2f}" for right in found)
        print(
            f"{'all' if count is None else count} real digits: {shown}; mean {statistics.mean(found):.2f} %", flush=True
        )


if __name__ == "__main__":
    sys.exit(run_command(run, None))
