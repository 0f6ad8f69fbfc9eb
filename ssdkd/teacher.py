"""Train a teacher on real data, for those who have none: `python -m ssdkd.teacher --dataset mnist ...`.

This is the one place where real images train a network, and that network is never a student.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssdkd.buffer import random_views, render
from ssdkd.build import model_for, require_trainable
from ssdkd.config import option, parse_command_line
from ssdkd.data import LabelledImages, load_dataset
from ssdkd.devices import autocast_for, choose_device, is_out_of_memory, lay_out
from ssdkd.errors import ConfigError, NumericalError, run_command
from ssdkd.evaluation import accuracy, predictions
from ssdkd.files import expanded, require_writable
from ssdkd.models import count_multiply_adds, save_trained
from ssdkd.trouble import learned


@dataclass
class TeacherTraining:
    """One teacher, trained by SGD with a one-cycle learning rate."""

    model: str = option("lenet5", "registered model, or an import path such as my_pkg.nets:build")
    arguments: dict[str, Any] = option({}, "keyword arguments of the model")
    dataset: str = option("mnist", "training and evaluation set")
    data_root: str | None = option(None, "where it lies")
    epochs: int = option(10, "passes over the training images", low=1)
    batch: int = option(128, "images in a step", low=1)
    learning_rate: float = option(0.1, "the largest learning rate", low=0)
    weight_decay: float = option(5e-4, "weight decay", low=0)
    shift: int = option(0, "random shifts of the images, in pixels", low=0)
    limit: int | None = option(None, "use so many training images only", low=1)
    seed: int = option(0, "everything random follows from it", low=0, high=2**48)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    precision: str = option("auto", "arithmetic", choices=("auto", "float32", "bfloat16"))
    out: str = option("teacher.safetensors", "file to write")


def train(
    model: nn.Module,
    data: LabelledImages,
    options: TeacherTraining,
    device: torch.device,
    report: Callable[[int, float], None] = lambda epoch, loss: None,
) -> nn.Module:
    """Train `model` on `data` and return it in evaluation mode; `report` hears each epoch's mean loss."""
    spec = data.spec
    lay_out(model.to(device), torch.channels_last).train()
    random = torch.Generator(device).manual_seed(options.seed)
    images = data.images.permute(0, 2, 3, 1).contiguous().to(device)
    labels = data.labels.to(device)
    mean, std = spec.normalisation(device)
    work = count_multiply_adds(model, spec.shape)
    autocast = autocast_for(options.precision, device, work)
    batch = min(options.batch, len(labels))
    steps = max(1, len(labels) // batch)
    optimizer = torch.optim.SGD(
        model.parameters(), options.learning_rate, 0.9, nesterov=True, weight_decay=options.weight_decay
    )
    total = options.epochs * steps
    rising = 0.2 if total != 5 else 0.3  # PyTorch divides by 0 where the rise is of exactly one step
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, total, pct_start=rising)
    for epoch in range(options.epochs):
        order = torch.randperm(len(labels), generator=random, device=device)
        loss_of_epoch = torch.zeros((), device=device)
        for rows in order[: steps * batch].view(steps, batch):
            views = random_views(len(rows), 2, options.shift, spec.flip, random)[:, 1]
            inputs: Tensor = (render(images, rows, views).float() / 255.0 - mean) / std
            with autocast:
                logits = model(inputs).float()
            loss = F.cross_entropy(logits, labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_of_epoch += loss.detach()
        report(epoch + 1, loss_of_epoch.item() / steps)
    return model.eval()


def run(argv: Sequence[str] | None = None) -> None:
    options, _ = parse_command_line(
        TeacherTraining, argv, prog="python -m ssdkd.teacher", description="Train a teacher on real data."
    )
    device = choose_device(options.device)
    out = expanded(options.out)
    if out.suffix != ".safetensors":
        raise ConfigError(f"out: weights cannot be saved as {out}; name a file in .safetensors.")
    require_writable(out, "out")
    torch.manual_seed(options.seed)
    train_set = load_dataset(options.dataset, options.data_root, "train", limit=options.limit)
    test_set = load_dataset(options.dataset, options.data_root, "test")
    spec = train_set.spec
    if options.shift >= min(spec.height, spec.width):
        raise ConfigError(f"shift: {options.shift} pixels move a {spec.height}x{spec.width} image out of sight.")
    model = model_for(options.model, options.arguments, spec)
    with torch.random.fork_rng(devices=[]):
        images = min(options.batch, len(train_set.labels), 2)
        require_trainable(model, "teacher", spec, torch.channels_last, images)
    start = time.perf_counter()
    train(model, train_set, options, device, lambda epoch, loss: print(f"epoch {epoch}: loss {loss:.4f}", flush=True))
    if not all(bool(weight.isfinite().all()) for weight in learned(model).values()):
        raise NumericalError("the teacher's weights left the finite numbers, nothing was saved; lower learning_rate.")
    save_trained(model, out)  # before it is measured, which may fail
    print(f"weights in {out}", flush=True)
    mean, std = spec.normalisation(device)
    value = accuracy(predictions(model, test_set.images, mean, std, nullcontext()), test_set.labels)
    print(f"test accuracy {value:.2f} % after {time.perf_counter() - start:.0f} s")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; a user's mistake is one sentence and exit code 2."""
    try:
        return run_command(run, argv, stopped="stopped.")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print("error: out of memory: lower batch, or train a smaller model.", file=sys.stderr)
        return NumericalError.exit_code


if __name__ == "__main__":
    sys.exit(main())
