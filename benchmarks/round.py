"""A round of the engine against its floor, and replay against other ways to draw.

    python -m benchmarks.round [--json FILE] [--tasks digits,mnist,cifar10] [--mnist-teacher FILE]

The floor of a round is what no bookkeeping can save: forward, backward and optimiser step of the student on as many
batches of random input, and for each inversion step forward and backward of teacher and (where a term asks for it)
student with the loss terms, and the optimiser's step on plain pixels, or on the generator where one is searched on. A
round and its floor are timed in turn in one process, and the ratio is the median over these pairs, so that a busy
machine slows both. Everything above the floor is told apart: the search's own work (textures, pyramid, meta step),
labelling, keeping, replay's own work, measuring. Beside it stands the ratio to a floor with the plainest loss instead
of the loss terms.

Weights do not change the time, so networks without a given teacher are random.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.arguments import names_in, numbers_in, require_at_least
from ssdkd import selection
from ssdkd.buffer import ReplayBuffer, Samples, random_views, render
from ssdkd.build import build_engine, image_spec
from ssdkd.coefficients import Coefficients
from ssdkd.config import RunConfig, build, read_yaml
from ssdkd.devices import choose_device, keep_freed_memory
from ssdkd.distiller import make_optimizer
from ssdkd.engine import Engine
from ssdkd.errors import ConfigError, Parser, run_command
from ssdkd.files import require_writable, write_result
from ssdkd.models import create_model

ENDLESS = 10**6  # rounds: no task ends while it is timed
TASKS = ("digits", "mnist", "cifar10")


def add_timing_options(parser: argparse.ArgumentParser) -> None:
    """What every command that times something takes."""
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    clock = "seconds of the clock on the wall, or of this process alone: for one thread on a busy machine"
    parser.add_argument("--clock", default="wall", choices=("wall", "processor"), help=clock)
    parser.add_argument("--json", help="file to write")


def write_json(file: str | None, told: Any) -> None:
    """What `--json` asks for."""
    write_result(file, "--json", json.dumps(told, indent=2) + "\n")


def ratio_of(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """What is timed in turn, divided turn by turn: the median, and the range."""
    ratios = sorted(mine / their for mine, their in zip(ours, theirs, strict=True))
    return {"ratio": statistics.median(ratios), "ratio_range": [ratios[0], ratios[-1]]}


def prepare(task: str, teacher: str | None, device: str, options: dict[str, Any]) -> Engine:
    """The engine of a ready-made job whose budget does not end; a teacher without weights is random."""
    always: dict[str, Any] = {"rounds": ENDLESS, "device": device, "inversion": {"warmup": 2}, "policy": "uniform"}
    if teacher is not None:
        always["teacher"] = {"checkpoint": teacher}
    return engine_of(build(RunConfig, [read_yaml(task), (always, "benchmark"), (options, "options")]))


def engine_of(config: RunConfig) -> Engine:
    """The engine that `config` describes; a teacher without weights is random, which the time does not see."""
    network = None
    if config.teacher.checkpoint is None:
        spec = image_spec(config)
        torch.manual_seed(0)
        kind = {"num_classes": spec.num_classes, "in_channels": spec.channels, "image_size": spec.height}
        network = create_model(config.teacher.name, config.teacher.arguments, **kind)  # type: ignore[arg-type]
    return build_engine(config, teacher=network)


class Clock:
    """Seconds of named pieces of work; a piece is timed by standing in for the method that does it."""

    def __init__(self, device: torch.device, processor: bool = False) -> None:
        """With `processor`, seconds are those of the processor, which other work on the machine does not count to."""
        self.device = device
        self.now = time.process_time if processor else time.perf_counter
        self.seconds: dict[str, float] = {}

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, work: Callable[[], Any]) -> float:
        self.wait()
        start = self.now()
        work()
        self.wait()
        return self.now() - start

    def watch(self, owner: Any, method: str, name: str) -> None:
        original = getattr(owner, method)

        def timed(*arguments: Any, **named: Any) -> Any:
            out: list[Any] = []
            took = self.time(lambda: out.append(original(*arguments, **named)))
            self.seconds[name] = self.seconds.get(name, 0.0) + took
            return out[0]

        setattr(owner, method, timed)


class Floor:
    """The bare work of a round, on copies of its networks and on random input."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        learning, inversion, device = engine.config.distillation, engine.config.inversion, engine.device
        shape = engine.spec.shape
        layout = engine.distiller.layout
        self.student = copy.deepcopy(engine.student)
        compiled = engine.distiller.forward is not engine.learner
        self.forward: Any = torch.compile(self.student) if compiled else self.student
        self.optimizer = make_optimizer(
            self.student, engine.optimizer_name, 1e-3, learning.momentum, learning.weight_decay, learning.nesterov
        )
        self.inputs = torch.randn((learning.batch, *shape), device=device).contiguous(memory_format=layout)
        made = engine.recipe().inverted
        self.targets = torch.randint(0, engine.spec.num_classes, (made,), device=device)
        self.generator = copy.deepcopy(getattr(engine.inverter, "base", None))
        if self.generator is not None:
            latents = torch.randn((made, inversion.latent), device=device, requires_grad=True)
            self.searched = [latents, *self.generator.parameters()]
        else:
            pixels = torch.rand((made, *shape), device=device).contiguous(memory_format=layout)
            self.searched = [pixels.requires_grad_(True)]
        self.search = torch.optim.Adam(self.searched, lr=1e-3, betas=(0.5, 0.999), fused=True)

    def learn(self) -> None:
        """As many student steps as a round has at effort 1."""
        self.student.train()
        for _ in range(self.engine.config.distillation.steps):
            with self.engine.autocast:
                logits = self.forward(self.inputs)
            self.optimizer.zero_grad(set_to_none=True)
            logits.float().square().mean().backward()
            self.optimizer.step()

    def invert(self, with_terms: bool) -> None:
        """As many inversion steps as a round has, with the loss terms or with the plainest loss."""
        engine, inverter = self.engine, self.engine.inverter
        self.student.eval()
        for _ in range(engine.inversion_steps if len(self.targets) else 0):
            with engine.autocast:
                images = self.searched[0] if self.generator is None else self.generator(self.searched[0], self.targets)
            if with_terms:
                loss, _ = inverter._weigh(inverter._look(images, self.targets, self.student), 1.0)
            else:
                loss = self.plain_loss(images)
            for parameter, gradient in zip(self.searched, torch.autograd.grad(loss, self.searched), strict=True):
                parameter.grad = gradient
            self.search.step()

    def plain_loss(self, images: Tensor) -> Tensor:
        with self.engine.autocast:
            inputs = (images - self.engine.mean) / self.engine.std
            loss: Tensor = self.engine.teacher(inputs).float().square().mean()
            if self.engine.inverter.reads_student:
                loss = loss + self.student(inputs).float().square().mean()
        return loss


def time_round(task: str, engine: Engine, repetitions: int, processor: bool = False) -> dict[str, Any]:
    """A round and its floor, in turn: -> the medians, and where the difference goes."""
    loop, coefficients, clock = engine.loop(), Coefficients(refresh=0.2), Clock(engine.device, processor)
    next(loop)
    fill(engine.buffer)  # so that every round does all of a round's work
    floor = Floor(engine)
    for work in (
        lambda: loop.send(coefficients),
        floor.learn,
        partial(floor.invert, True),
        partial(floor.invert, False),
    ):  # caches and compilation
        work()
    clock.watch(engine.inverter, "invert", "invert")
    clock.watch(engine, "_label", "label")
    clock.watch(engine, "_judged", "judge candidates")
    clock.watch(engine, "keep", "keep")
    clock.watch(engine.distiller, "replay", "replay")
    clock.watch(engine, "measure", "measure")
    rows: list[dict[str, float]] = []
    for _ in range(repetitions):
        clock.seconds = {}
        whole = clock.time(lambda: loop.send(coefficients))
        pieces = dict(clock.seconds)
        learn, invert = clock.time(floor.learn), clock.time(partial(floor.invert, True))
        plainly = clock.time(partial(floor.invert, False))
        told = sum(pieces.values())
        search, replay = pieces.pop("invert", 0.0), pieces.pop("replay")
        above = {"search beside its steps": search - invert, **pieces, "replay": replay - learn}
        above["draw and the rest"] = whole - told
        row = {
            "round": whole,
            "floor": learn + invert,
            "plain floor": learn + plainly,
            "floor learn": learn,
            "floor invert": invert,
        }
        rows.append(row | {f"above {name}": seconds for name, seconds in above.items()})
    median = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    learning = engine.config.distillation
    return {
        "task": task,
        **ratio_of([row["round"] for row in rows], [row["floor"] for row in rows]),
        "ratio_to_plainest_loss": statistics.median(row["round"] / row["plain floor"] for row in rows),
        "repetitions": repetitions,
        "round_seconds": median["round"],
        "floor_seconds": median["floor"],
        "floor": {"learn": median["floor learn"], "invert": median["floor invert"]},
        "above": {name[6:]: seconds for name, seconds in median.items() if name.startswith("above ")},
        "student_step_seconds": median["floor learn"] / learning.steps,
        "images_per_second": learning.batch * learning.steps / median["round"],
    }


# -- replay alone ---------------------------------------------------------------------------------------------


def fill(buffer: ReplayBuffer) -> None:
    """Fill what is free in `buffer` with noise, its samples of unequal difficulty."""
    held, classes = buffer.size, buffer.logits.shape[2]
    height, width, channels = buffer.images.shape[1:]
    stored, device = buffer.views.shape[1], buffer.images.device
    random = torch.Generator(device).manual_seed(0)
    while buffer.size < buffer.capacity:
        count = min(10_000, buffer.capacity - buffer.size)
        pixels = torch.randint(
            0, 256, (count, height, width, channels), generator=random, device=device, dtype=torch.uint8
        )
        logits = torch.randn((count, stored, classes), generator=random, device=device)
        confidence, named = torch.softmax(logits[:, 0], dim=1).max(dim=1)
        views = random_views(count, stored, min(2, height - 1, width - 1), False, random)
        buffer.append(Samples(pixels, views, logits, named, confidence), delta=1.0, round_index=0)
    buffer.delta[held:] = torch.rand(buffer.capacity - held, generator=random, device=device) ** 2


def replay_ours(buffer: ReplayBuffer, batch: int, steps: int, random: torch.Generator) -> None:
    """A round of replay as the engine does it: P and all draws once, then a gather and an update each step."""
    log_phi = torch.zeros((), device=buffer.delta.device)  # where eta is 0, the engine computes none
    pi = selection.priorities(selection.log_priority(buffer.delta, log_phi, 0.6, 0.0))
    rows = selection.draw(pi, steps * batch, random)
    weights = selection.importance_weights(pi, 0.4, rows)
    buffer.note_visits(rows)
    for row, weight in zip(rows.view(steps, batch), weights.view(steps, batch), strict=True):
        gather(buffer, row)
        buffer.note_replay(row, weight)


def replay_multinomial(buffer: ReplayBuffer, batch: int, steps: int, random: torch.Generator) -> None:
    """The plain way: P anew and torch.multinomial at each step."""
    for _ in range(steps):
        probabilities = buffer.delta**0.6
        total = probabilities.sum()
        row = torch.multinomial(probabilities, batch, replacement=True, generator=random)
        weights = (probabilities[row] / total * buffer.size) ** -0.4
        gather(buffer, row)
        buffer.delta[row] = weights / weights.max()


def gather(buffer: ReplayBuffer, rows: Tensor) -> tuple[Tensor, Tensor]:
    return render(buffer.images, rows, buffer.views[rows, 0]), buffer.logits[rows, 0]


def torchrl_replay(buffer: ReplayBuffer, batch: int) -> Callable[[int], None] | None:
    """The same contents in torchrl's prioritised buffer, if torchrl is installed."""
    try:
        from tensordict import TensorDict
        from torchrl.data import LazyTensorStorage, TensorDictPrioritizedReplayBuffer
    except ImportError:
        return None
    storage = LazyTensorStorage(buffer.capacity, device=buffer.images.device)
    theirs = TensorDictPrioritizedReplayBuffer(
        alpha=0.6, beta=0.4, storage=storage, batch_size=batch, priority_key="delta"
    )
    for rows in torch.arange(buffer.capacity, device=buffer.images.device).split(50_000):
        held = {"images": buffer.images[rows], "logits": buffer.logits[rows], "delta": buffer.delta[rows]}
        theirs.extend(TensorDict(held, batch_size=[len(rows)]))

    def play(steps: int) -> None:
        for _ in range(steps):
            drawn = theirs.sample()
            theirs.update_priority(drawn["index"], drawn["logits"].abs().amax(dim=(1, 2)))

    return play


def time_replay(
    capacity: int,
    shape: tuple[int, int, int],
    batch: int,
    steps: int,
    repetitions: int,
    device: torch.device,
    processor: bool = False,
) -> dict[str, Any]:
    """Microseconds of a batch (draw, weights, gather, update), each way in turn: medians."""
    buffer, clock = ReplayBuffer(capacity, shape, 10, 1, device), Clock(device, processor)
    fill(buffer)
    random = torch.Generator(device).manual_seed(1)
    ways: dict[str, Callable[[], None]] = {
        "ssdkd": lambda: replay_ours(buffer, batch, steps, random),
        "multinomial": lambda: replay_multinomial(buffer, batch, steps, random),
    }
    theirs = torchrl_replay(buffer, batch)
    if theirs is not None:
        ways["torchrl"] = lambda: theirs(steps)
    for work in ways.values():
        work()
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repetitions):
        for name, work in ways.items():
            took[name].append(clock.time(work) / steps)
    microseconds = {name: 1e6 * statistics.median(values) for name, values in took.items()}
    return {
        "capacity": capacity,
        "batch": batch,
        "steps_per_round": steps,
        "microseconds": microseconds,
        "images_per_second": {name: batch / (1e-6 * value) for name, value in microseconds.items()},
        "bytes_per_sample": buffer.bytes_per_sample(),
        "image_bytes": shape[0] * shape[1] * shape[2],
    }


# -- the command ----------------------------------------------------------------------------------------------


def show_round(row: dict[str, Any]) -> None:
    low, high = row["ratio_range"]
    print(
        f"\n{row['task']}: a round {1e3 * row['round_seconds']:.1f} ms, its floor {1e3 * row['floor_seconds']:.1f} ms "
        f"(student {1e3 * row['floor']['learn']:.1f}, inversion {1e3 * row['floor']['invert']:.1f}); "
        f"ratio {row['ratio']:.3f} ({low:.2f} to {high:.2f} over {row['repetitions']}; "
        f"{row['ratio_to_plainest_loss']:.3f} with the plainest loss in the floor), "
        f"{row['images_per_second']:.0f} images per second"
    )
    for name, seconds in sorted(row["above"].items(), key=lambda entry: -entry[1]):
        print(f"    {name:<26} {1e3 * seconds:>8.2f} ms {100 * seconds / row['floor_seconds']:>6.1f} % of the floor")


def show_replay(row: dict[str, Any], student_step: float | None) -> None:
    ways = ", ".join(f"{name} {value:.0f}" for name, value in row["microseconds"].items())
    share = ""
    if student_step:
        share = f"; {100e-6 * row['microseconds']['ssdkd'] / student_step:.1f} % of a CIFAR-10 student step"
    extra = row["bytes_per_sample"] - row["image_bytes"]
    print(
        f"    {row['capacity']:>9,} samples: {ways} microseconds a batch of {row['batch']}{share}; "
        f"{row['image_bytes']} + {extra} bytes a sample"
    )


def run(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m benchmarks.round", description="A round of the engine against its floor.")
    parser.add_argument("--tasks", default=",".join(TASKS), help="which of digits, mnist, cifar10; comma-separated")
    parser.add_argument("--mnist-teacher", help="weights of LeNet-5; random without")
    parser.add_argument("--cifar-teacher", help="weights of WRN-16-2; random without")
    parser.add_argument("--repetitions", type=int, default=9, help="pairs of a round and its floor")
    parser.add_argument("--precision", default="auto", help="auto, float32, bfloat16")
    parser.add_argument("--compile", default="auto", help="auto, on, off")
    parser.add_argument("--buffers", default="5000,50000,1000000", help="sizes for replay alone; '' for none")
    parser.add_argument("--replay-steps", type=int, default=20, help="batches for which P is computed once")
    parser.add_argument("--image", default="1,28,28", help="channels, height, width in those buffers")
    add_timing_options(parser)
    given = parser.parse_args(argv)
    require_at_least(given, repetitions=1, replay_steps=1, threads=1)
    tasks, buffers = names_in(given.tasks, TASKS, "--tasks"), numbers_in(given.buffers, "--buffers")
    shape = numbers_in(given.image, "--image")
    if len(shape) != 3:
        raise ConfigError(f"--image: expected channels, height and width, got {given.image!r}.")
    require_writable(given.json, "--json")
    device, processor = choose_device(given.device), given.clock == "processor"
    torch.set_num_threads(given.threads)
    if device.type == "cpu":
        keep_freed_memory()  # as every run does
    options = {"precision": given.precision, "compile": given.compile, "threads": given.threads}
    teachers = {"mnist": given.mnist_teacher, "cifar10": given.cifar_teacher}
    engines = [prepare(task, teachers.get(task), given.device, options) for task in tasks]  # all before the work
    rounds = []
    for task, engine in zip(tasks, engines, strict=True):
        rounds.append(time_round(task, engine, given.repetitions, processor))
        show_round(rounds[-1])
    step = next((row["student_step_seconds"] for row in rounds if row["task"] == "cifar10"), None)
    channels, height, width = shape
    replays = []
    print("\nreplay: draw, weights, gather, update")
    for capacity in buffers:
        image = (channels, height, width)
        replays.append(time_replay(capacity, image, 256, given.replay_steps, given.repetitions, device, processor))
        show_replay(replays[-1], step)
    if replays and "torchrl" not in replays[0]["microseconds"]:
        print("    torchrl is not installed, so its buffer was not timed (pip install torchrl)")
    machine = {
        "device": str(device),
        "clock": given.clock,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    machine |= {"processor": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()}
    write_json(given.json, {"rounds": rounds, "replay": replays, "machine": machine})


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
