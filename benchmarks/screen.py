"""Which coefficients are worth turning from where a policy has them: all of them at once, on training tasks.

    python -m benchmarks.make_family --out teachers/digits
    python -m benchmarks.screen --teachers-root teachers/digits --pairs 800 --processes 4 --out runs/screen.jsonl

A pair plays one task from one seed twice. In the first episode every coefficient's place in its range (-1 to 1) is
shifted, up or down by chance, all through the run, and once more, again by chance, from down to up or from up to down
in the course of it (`effort*progress`: from -1 times the shift at the start to once at the end). In the second episode
all of that is taken the other way round. So each pair tells of every shift, and the tasks, which differ far more than
policies do, cancel. Printed is by how much each shift alone changes the area under accuracy over compute, the last
accuracy and the accuracy at two thirds of the compute, in points, with standard errors: least squares over all pairs.
What is lost, or gained, on both sides alike does not show. With `--by making_share` (any entry of the observation), so
is what a steady shift is worth more where that entry was one standard deviation higher at the start.

A file that is there already is gone on with: pairs that it holds are not played again.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.evaluate import area_under, policy_by, rounds_of
from agents.fixed import Policy
from agents.policies import LearnedPolicy
from agents.processes import each_of
from agents.tasks import Task, family_from, merged, name_of, training_tasks
from benchmarks.arguments import require_at_least
from envs import SampleSelectionEnv
from envs.spaces import ENTRIES, PROGRESS, task_facts
from ssdkd.build import build_engine
from ssdkd.coefficients import RANGES
from ssdkd.config import RunConfig, build, read_yaml
from ssdkd.errors import ConfigError, Parser, first_line, run_command
from ssdkd.files import expanded, require_writable, write_result

SHIFTS = {  # of places in the range: wide, as a slight one tells nothing
    "w_div": 0.4,
    "wear": 0.3,
    "alpha": 0.3,
    "eta": 0.35,
    "adversarial": 0.4,
    "effort": 0.25,
    "anneal": 0.4,
    "textures": 0.35,
}  # not `batch`, which is but halved or doubled; nor `gamma` and `beta`, which lose either way, and `eta` with them
RISING = "*progress"
BEGINS = '{"number":'  # a file of pairs
CURVE = np.linspace(0.0, 1.0, 31)  # of the compute


@dataclass
class Pair:
    """Two episodes of one task from one seed, shifted against each other; what there are two of is in their order."""

    number: int
    policy: str  # its name, or its digest where it was learned
    seed: int
    task: str
    shifts: dict[str, float]  # in the first episode: coefficient, or coefficient*progress -> shift
    begins: dict[str, float]  # the first observation, by entry
    area: list[float]  # percent, as all of these
    final: list[float]
    curves: list[list[float]]  # accuracy at CURVE


def factors_of(turned: dict[str, float]) -> dict[str, float]:
    """All that is shifted: each of these throughout, and each with progress."""
    return {**turned, **{name + RISING: shift for name, shift in turned.items()}}


@dataclass
class Shifted:
    """A policy whose actions are moved by `shifts`."""

    policy: Policy
    shifts: dict[str, float]

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        action, state = self.policy.predict(observation, state, episode_start, deterministic)
        moved = action + shift_at(self.shifts, float(observation[PROGRESS]))
        return np.clip(moved, -1.0, 1.0).astype(np.float32), state


def play_pair(number: int, policy: str, seed: int, base: str, task: Task, turned: dict[str, float]) -> Pair:
    """Both episodes of a pair, whose signs its number and the seed decide."""
    factors = factors_of(turned)
    signs = np.random.default_rng([seed, number]).choice([-1, 1], len(factors))
    shifts = {name: float(sign * shift) for sign, (name, shift) in zip(signs, factors.items(), strict=True)}
    pair = Pair(number, policy, seed, name_of(task), shifts, {}, [], [], [])
    for direction in (1.0, -1.0):
        shifted = Shifted(policy_by(policy, seed + number), {name: direction * by for name, by in shifts.items()})
        env = SampleSelectionEnv(base, tasks=[task], reward="area")
        at: list[float] = []
        right: list[float] = []
        for observation, _, progress, _ in rounds_of(env, shifted, seed + number):
            pair.begins = pair.begins or {e.name: float(v) for e, v in zip(ENTRIES, observation, strict=True)}
            at.append(progress)
            right.append(accuracy_in(env))
        pair.area.append(area_under(at, right))
        pair.final.append(right[-1])
        pair.curves.append(np.interp(CURVE, at, right).tolist())
    return pair


def accuracy_in(env: SampleSelectionEnv) -> float:
    """Of the student by now, in percent."""
    accuracy = env.engine.accuracy(env.engine.student)
    if accuracy is None:
        raise ConfigError("a task of the family has no evaluation set, by which shifts are judged: give it one.")
    return accuracy


def shift_at(shifts: dict[str, float], progress: float) -> np.ndarray:
    """What they add to an action at that share of the budget: (coefficients,)."""
    rise = 2.0 * progress - 1.0
    return np.array([shifts.get(r.name, 0.0) + rise * shifts.get(r.name + RISING, 0.0) for r in RANGES])


def effects(shifted: np.ndarray, halves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares: (pairs, factors), half the differences (pairs,) -> effects, standard errors (factors,)."""
    inverse = np.linalg.inv(shifted.T @ shifted)
    found = inverse @ shifted.T @ halves
    left = halves - shifted @ found
    variance = left @ left / (len(halves) - shifted.shape[1])
    return found, np.sqrt(variance * np.diag(inverse))


def halves_of(pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
    """Half the difference between a pair's first and second episode (pairs,), by measure."""
    two_thirds = [[np.interp(2 / 3, CURVE, curve) for curve in pair.curves] for pair in pairs]
    both = {"area": [p.area for p in pairs], "final": [p.final for p in pairs], "at two thirds": two_thirds}
    return {name: (np.array(of)[:, 0] - np.array(of)[:, 1]) / 2.0 for name, of in both.items()}


def columns(pairs: Sequence[Pair], by: str | None) -> dict[str, np.ndarray]:
    """What is told apart: name -> (pairs,), in units of the shift, or of the shift and of a deviation of entry `by`."""
    found: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(name for pair in pairs for name in pair.shifts):
        shifts = np.array([pair.shifts.get(name, 0.0) for pair in pairs])
        size = np.abs(shifts).max()
        found[f"`{name}` | {size:g}"] = shifts / size
    if by is not None:
        if any(by not in pair.begins for pair in pairs):
            raise ConfigError(f"--by: there are pairs from before the entry {by}; name another, or another --out.")
        seen = np.array([pair.begins[by] for pair in pairs])
        if seen.std() == 0:
            raise ConfigError(f"--by: {by} is {seen[0]:g} at the start of every episode; name an entry that differs.")
        apart = (seen - seen.mean()) / seen.std()
        steady = {name: signs for name, signs in found.items() if RISING not in name}
        found |= {f"{name}, `{by}` {seen.std():.3f} higher": signs * apart for name, signs in steady.items()}
    return found


def show(pairs: Sequence[Pair], by: str | None = None) -> None:
    """A table: each shift, and what it is worth."""
    told_apart = columns(pairs, by)
    shifted = np.stack(list(told_apart.values()), axis=1)
    if len(pairs) <= len(told_apart) or np.linalg.matrix_rank(shifted) < len(told_apart):  # signs may go together
        print(f"{len(pairs)} pairs do not tell {len(told_apart)} effects apart: play more")
        return
    found = {name: effects(shifted, halves) for name, halves in halves_of(pairs).items()}
    print(f"{len(pairs)} pairs on {len({pair.task for pair in pairs})} tasks")
    print(f"| shifted | by | {' | '.join(found)} |")
    print("| --- " * (len(found) + 2) + "|")
    for place, name in enumerate(told_apart):
        told = " | ".join(f"{effect[place]:+.2f} ({error[place]:.2f})" for effect, error in found.values())
        print(f"| {name} | {told} |")


def read(file: Path) -> list[Pair]:
    """The pairs that a file holds; a last line that was cut off does not count."""
    try:
        if not file.is_file():
            return []
        text = file.read_text(encoding="utf-8")
        if text[: len(BEGINS)] != BEGINS[: len(text)]:  # which may have been cut off
            raise ValueError(f"it does not begin with {BEGINS}")
        pairs = [pair_in(line) for line in text.rpartition("\n")[0].splitlines()]
        twice = [number for number, times in Counter(pair.number for pair in pairs).items() if times > 1]
        if twice:
            raise ValueError(f"it holds pair {twice[0]} twice")
        return pairs
    except Exception as error:  # whatever a line of somebody else's comes to
        raise ConfigError(f"--out: {file} is no file of pairs ({first_line(error)}); name another.") from error


def pair_in(line: str) -> Pair:
    """The pair that a line holds; an error of some kind where it holds none."""
    pair = Pair(**json.loads(line))
    lengths = [len(held) for held in (pair.area, pair.final, pair.curves, *pair.curves)]
    measured = [pair.shifts.values(), pair.begins.values(), pair.area, pair.final, *pair.curves]
    numbers = [number for held in measured for number in held]
    sound = type(pair.number) is int and isinstance(pair.task, str) and lengths == [2, 2, 2, len(CURVE), len(CURVE)]
    if not sound or not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
        raise ValueError(f"its pair {pair.number} is not whole")
    return pair


def no_longer_than(longest: int, tasks: Sequence[Task], base: Task) -> list[Task]:
    """The tasks over `base` whose budget is at most so many rounds, and not in minutes."""
    usual = {"rounds": RunConfig.rounds, "minutes": None}
    wholes = [(task, merged(usual, base, task)) for task in tasks]
    return [task for task, its in wholes if its["minutes"] is None and its["rounds"] and its["rounds"] <= longest]


def dearer_than(share: float, tasks: Sequence[Task], base: Task) -> list[Task]:
    """The tasks over `base` in which making images takes more than this share of a neutral round."""
    engines = (build_engine(build(RunConfig, [(merged(base, task), name_of(task))])) for task in tasks)
    return [task for task, engine in zip(tasks, engines, strict=True) if task_facts(engine)["making_share"] > share]


def turn(text: str) -> tuple[str, float]:
    """COEFFICIENT=SHIFT."""
    name, _, size = text.partition("=")
    try:
        shift = float(size)
    except ValueError as error:
        raise ConfigError(f"--turn: expected COEFFICIENT=SHIFT, got {text!r}.") from error
    if name not in {r.name for r in RANGES} or not 0.0 < shift <= 1.0:
        raise ConfigError(f"--turn: {text!r} needs the name of a coefficient, and a shift above 0 and at most 1.")
    return name, shift


def run(argv: Sequence[str] | None = None) -> list[Pair]:
    parser = Parser(prog="python -m benchmarks.screen", description=__doc__)
    parser.add_argument("--policy", default="learned", help="learned, a fixed policy, coefficients or a policy's file")
    parser.add_argument("--family", default="family", help="config of the tasks")
    parser.add_argument("--teachers-root", help="folder of the family's teachers")
    parser.add_argument("--longest", type=int, default=60, help="tasks of no more rounds than this")
    parser.add_argument(
        "--dearer-than", type=float, metavar="SHARE", help="only tasks with a higher making_share; without, all"
    )
    parser.add_argument("--turn", nargs="+", metavar="COEFFICIENT=SHIFT", help="what to shift; without, nearly all")
    parser.add_argument(
        "--by", metavar="ENTRY", help="tell too what a steady shift is worth where this entry is higher"
    )
    parser.add_argument("--pairs", type=int, default=100, help="pairs of episodes")
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first pair, and of what is drawn")
    parser.add_argument("--processes", type=int, default=1, help="pairs played at once")
    parser.add_argument(
        "--out", type=expanded, required=True, help="file of one JSON line a pair; gone on with if it is there"
    )
    given = parser.parse_args(argv)
    if given.by is not None and given.by not in {entry.name for entry in ENTRIES}:
        raise ConfigError(f"--by: {given.by!r} is no entry of the observation.")
    turned = dict(turn(text) for text in given.turn) if given.turn else SHIFTS
    require_at_least(given, pairs=1, first_seed=0, processes=1)
    policy = policy_by(given.policy, 0)  # a file that cannot be used is noticed before the first episode
    mark = policy.fingerprint() if isinstance(policy, LearnedPolicy) else given.policy
    family = family_from(given.family, given.teachers_root)
    base = read_yaml(family.base)[0]
    tasks = no_longer_than(given.longest, training_tasks(family), base)
    if not tasks:
        raise ConfigError(f"--longest: the family has no task of at most {given.longest} rounds.")
    if given.dearer_than is not None:
        tasks = dearer_than(given.dearer_than, tasks, base)
        if not tasks:
            raise ConfigError(f"--dearer-than: the family has no task with a making_share above {given.dearer_than}.")
    out = given.out
    pairs = read(out)
    drawn = np.random.default_rng(given.first_seed).integers(len(tasks), size=given.pairs)
    shifts = factors_of(turned)
    for pair in pairs:
        task = name_of(tasks[drawn[pair.number]]) if 0 <= pair.number < given.pairs else pair.task
        its = (pair.policy, pair.seed, pair.task, {name: abs(shift) for name, shift in pair.shifts.items()})
        if its != (mark, given.first_seed, task, shifts):
            raise ConfigError(f"--out: {out} holds pairs of another policy, seed, family or shift; name another.")
    missing = sorted(set(range(given.pairs)) - {pair.number for pair in pairs})
    jobs: list[tuple[Any, ...]] = [
        (number, given.policy, given.first_seed, family.base, tasks[drawn[number]], turned) for number in missing
    ]
    require_writable(out, "--out")
    write_result(out, "--out", "".join(json.dumps(asdict(pair)) + "\n" for pair in pairs))
    with out.open("a", encoding="utf-8") as file:
        for pair in each_of(jobs, play_pair, given.processes):
            pair.policy = mark
            pairs.append(pair)
            file.write(json.dumps(asdict(pair)) + "\n")
            file.flush()
    show(pairs, given.by)
    return pairs


def main(argv: Sequence[str] | None = None) -> int:
    """The command; a user's mistake is one sentence and exit code 2."""
    torch.set_num_threads(1)
    return run_command(run, argv, stopped="stopped; the same command goes on with the pairs that are left.")


if __name__ == "__main__":
    sys.exit(main())
