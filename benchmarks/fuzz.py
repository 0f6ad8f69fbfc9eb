"""Feed damaged and hostile files to everything in ssdkd that reads a file.

    python -m benchmarks.fuzz --cases 100000 --seed 0

Every case is a valid or malicious file of its kind, changed at random: bits, bytes, numbers, pieces moved or
cut, and the parts inside archives and under checksums changed with the wrapping made good again. A reader may
take it or raise an `SsdkdError` with a message of readable length; anything else is a finding: another
exception, a dead process, more than ten seconds, more than a gibibyte, or code that ran (the baits would
leave a file, which is tried out first).

A finding is printed with what repeats it: `--target NAME --case NUMBER` with the same seed, which shows the
traceback and keeps the file. Ends with 1 if there is any.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

from agents.policies import Description, LearnedPolicy, fresh_network, load_policy
from benchmarks.arguments import require_at_least
from envs.spaces import ENTRIES
from ssdkd import checkpoint
from ssdkd.coefficients import RANGES
from ssdkd.config import RunConfig, build, read_yaml, to_yaml
from ssdkd.data import load_dataset
from ssdkd.errors import Parser, SsdkdError
from ssdkd.models import load_weights

MOST_SECONDS = 10
MOST_MIB = 1024
FINDINGS_SHOWN = 5


@dataclass(frozen=True)
class Target:
    """A reader, and the files that its cases start from.

    `seeds` takes the path of the trace that malicious files are to leave.
    """

    name: str
    suffix: str
    seeds: Callable[[Path], list[bytes]]
    read: Callable[[Path], object]


# ----------------------------------------------------------------------------------------------------
# Baits: what runs code when it is unpickled or constructed
# ----------------------------------------------------------------------------------------------------


class Bait:
    """Calls `function` with `arguments` if anybody unpickles it."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def baits(trace: Path) -> list[Bait]:
    return [
        Bait(os.system, f"touch {trace}"),
        Bait(exec, f"open({str(trace)!r}, 'w')"),
        Bait(Path.touch, trace),
        Bait(getattr, Bait(Path, str(trace)), "touch"),
        Bait(torch.load, str(trace)),
    ]


def yaml_baits(trace: Path) -> list[str]:
    return [
        f'!!python/object/apply:os.system ["touch {trace}"]',
        f"!!python/object/apply:builtins.open [{trace}, w]",
        f"!!python/object/new:pathlib.Path [{trace}]",
        f'!!python/object/apply:subprocess.check_output [["touch", "{trace}"]]',
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/tuple [1, 2]",
    ]


def require_live_baits(trace: Path) -> None:
    """Show in another process that the baits do leave the trace; else their absence would prove nothing."""
    for code in (
        "import pickle, sys; pickle.load(sys.stdin.buffer)",
        "import yaml, sys; yaml.unsafe_load(sys.stdin)",
    ):
        bait = pickle.dumps(baits(trace)[0]) if "pickle" in code else yaml_baits(trace)[0].encode()
        subprocess.run([sys.executable, "-c", code], input=bait, check=True)
        if not trace.exists():
            raise RuntimeError("the bait left no trace, so the fuzzer would not see code that runs")
        trace.unlink()


# ----------------------------------------------------------------------------------------------------
# Targets
# ----------------------------------------------------------------------------------------------------


def yaml_seeds(trace: Path) -> list[bytes]:
    whole = to_yaml(RunConfig())
    # Few bytes that stand for 3^40 numbers.
    laughs = "&a0 [0, 0, 0], " + ", ".join(f"&a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, 40))
    texts = [
        whole,
        "teacher:\n  name: lenet5\n  arguments: {width: 2}\nrounds: 10\ndevice: cpu\n",
        "inversion: {images: 64, terms: {one_hot: 1.0, entropy: 0.5}}\nimage: {mean: [0.5], std: [0.2]}\n",
        "base: &b {images: 3}\ninversion: *b\nbuffer:\n  <<: *b\n  capacity: 10\n",
        "seed: ${rounds}\nrounds: ${seed}\nout: ${oc.env:HOME}\ndataset: ${oc.decode:'[1'}\n",
        "rounds: ${oc.create:${distillation}}\nteacher: ${student}\nstudent: ${teacher}\n",
        "rounds: 0x10\nseed: 1_000\nminutes: .inf\ncompile: yes\nout: 2020-01-01\nthreads: 1:30:00\n",
        *(f"{key}: [{laughs}]\n" for key in ("rounds", "teacher", "unknown")),
        f"image: {{mean: [{laughs}]}}\n",
        f"teacher: {{arguments: {{x: [{laughs}]}}}}\n",
        f"? [{laughs}]\n: 1\n",
        "teacher: &t {arguments: *t}\n",
        "rounds: &r [*r]\n",
        "? [a, b]\n: 1\n? {a: 1}\n: 2\nnull: 3\n1.5: 4\n",
        "--- {}\n--- {}\n",
        "[" * 2000,
        "a: " + "{b: " * 500,
        *(f"{key}: {bait}\n" for key in ("teacher", "rounds", "out") for bait in yaml_baits(trace)),
        *(f"teacher:\n  arguments:\n    x: {bait}\n" for bait in yaml_baits(trace)),
    ]
    return [text.encode() for text in texts]


def read_config(path: Path) -> object:
    return build(RunConfig, [read_yaml(str(path))])


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 3))


def torch_seeds(trace: Path) -> list[bytes]:
    state = small_model().state_dict()
    contents: list[Any] = [
        state,
        {"state_dict": state, "epoch": 3},
        {"model": {f"module.{k}": v for k, v in state.items()}},
    ]
    contents += [{"state_dict": {**state, "x": bait}} for bait in baits(trace)]
    seeds = [pickle.dumps(bait, protocol) for bait in baits(trace) for protocol in (0, 2, 4)]
    for content in contents:
        for zipped in (True, False):
            file = io.BytesIO()
            torch.save(content, file, _use_new_zipfile_serialization=zipped)
            seeds.append(file.getvalue())
    return seeds


def safetensors_seeds(trace: Path) -> list[bytes]:
    state = small_model().state_dict()
    half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    return [safetensors.torch.save(state), safetensors.torch.save(half, {"format": "pt"})]


def read_weights(path: Path) -> object:
    load_weights(_MODEL, path)
    return "weights"


_MODEL = small_model()


def checkpoint_seeds(trace: Path) -> list[bytes]:
    model = small_model()
    optimizer = torch.optim.Adam(model.parameters())
    model[0](torch.ones(1, 1, 4, 4)).sum().backward()  # type: ignore[index]
    optimizer.step()
    states = [
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "numpy": np.random.PCG64(0).state},
        [1, -(2**100), 0.5, float("nan"), "text", "\ud800", None, True, (1, ()), {0: {}, "a": []}],
        [
            torch.ones(2, dtype=torch.bool),
            torch.ones(2, 3, 4, 5).permute(3, 0, 2, 1),
            np.ones(3),
            np.float32(1),
        ],
        [torch.ones(3, dtype=torch.complex64), torch.empty(0, 3), torch.tensor(1, dtype=torch.bfloat16)],
    ]
    with tempfile.TemporaryDirectory() as folder:
        return [checkpoint.save(Path(folder), state, 0).read_bytes() for state in states]


def npz_seeds(trace: Path) -> list[bytes]:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (6, 4, 4), dtype=np.uint8)
    labels = np.arange(6) % 3
    color = np.stack([images] * 3, axis=-1)
    objects = np.array([*baits(trace), None], dtype=object)
    contents: list[dict[str, Any]] = [
        {"images": images, "labels": labels},
        {"x_test": color, "y_test": labels[:, None], "x_train": color, "y_train": labels},
        {"images": np.asfortranarray(images), "labels": labels, "class_names": np.array(["a", "b", "c"])},
        {"images": objects, "labels": labels},
        {"images": images, "labels": objects},
        {"images": images, "labels": labels, "class_names": objects},
    ]
    seeds = []
    for content in contents:
        for write in (np.savez, np.savez_compressed):
            file = io.BytesIO()
            write(file, **content)  # type: ignore[operator]
            seeds.append(file.getvalue())
    return seeds


def read_npz(path: Path) -> object:
    return load_dataset("npz", path)


def policy_seeds(trace: Path) -> list[bytes]:
    inputs, outputs = [entry.name for entry in ENTRIES], [r.name for r in RANGES]
    described = [
        Description("sac", {"pi": [6], "qf": [5]}, "relu", inputs[:4], outputs),
        Description("ppo", [4, 3], "tanh", inputs, outputs[:2], training={"steps": 10}),
        Description("td3", [4], "relu", inputs[:2], outputs[:3], reward_scale=2.0),
    ]
    seeds = []
    with tempfile.TemporaryDirectory() as folder:
        for number, description in enumerate(described):
            path = Path(folder) / f"{number}.safetensors"
            LearnedPolicy(fresh_network(description), description).save(path)
            seeds.append(path.read_bytes())
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:  # as Stable-Baselines3 lays out what it unpickles
        bait = base64.b64encode(pickle.dumps(baits(trace)[0])).decode()
        archive.writestr("data", json.dumps({"target_entropy": 1.0, "policy_class": {":serialized:": bait}}))
    return [*seeds, file.getvalue()]


# Another reader is one line here.
TARGETS = [
    Target("config", ".yaml", yaml_seeds, read_config),
    Target("weights, safetensors", ".safetensors", safetensors_seeds, read_weights),
    Target("weights, torch", ".pth", torch_seeds, read_weights),
    Target("checkpoint", ".safetensors", checkpoint_seeds, checkpoint.load),
    Target("npz", ".npz", npz_seeds, read_npz),
    Target("policy", ".safetensors", policy_seeds, load_policy),
]


# ----------------------------------------------------------------------------------------------------
# Changing a file
# ----------------------------------------------------------------------------------------------------

_PIECES = [
    *(b"\0", b"\xff" * 8, b"-1", b"0", b"1e999", b"NaN", b"null", b"true", b'""', b"[]", b"{}", b"\n", b" "),
    *(b"'", b'"', b": ", b"- ", b"[", b"]", b"{", b"}", b"&a ", b"*a", b"<<: ", b"!!str ", b"!!binary "),
    *(b"!!set ", b"${", b"}", b"%", b"9223372036854775807", b"-9223372036854775808", b"18446744073709551616"),
    *(b"9" * 5000, b"[" * 3000, b"\xed\xa0\x80", b"cos\nsystem\n", b"\x80\x04", b"R.", b"0.", b"data_offsets"),
    *(b"shape", b"dtype", b'"F64"', b'"BOOL"', b"'descr'"),
]


def changed(data: bytes, seeds: list[bytes], chance: random.Random) -> bytes:
    """`data` with up to four random changes; sometimes none, so that baits come as they are, too."""
    for _ in range(chance.choice((0, 1, 1, 1, 2, 4))):
        if data[:2] == b"PK" and chance.random() < 0.6:
            data = _inside_zip(data, chance)
        elif data[8:9] == b"{" and chance.random() < 0.6:
            data = _inside_safetensors(data, seeds, chance)
        else:
            data = _anywhere(data, seeds, chance)
    return data


def _anywhere(data: bytes, seeds: list[bytes], chance: random.Random) -> bytes:
    start = chance.randint(0, len(data))
    end = min(len(data), start + int(2 ** chance.uniform(0, 8)))
    head, piece, tail = data[:start], data[start:end], data[end:]
    numbers = list(re.finditer(rb"\d+", data[:4096]))
    how = chance.randrange(10)
    if how == 0 and piece:
        return head + bytes([piece[0] ^ 1 << chance.randrange(8)]) + piece[1:] + tail
    if how == 1:
        return head + chance.randbytes(len(piece)) + tail
    if how == 2:
        return head + tail
    if how == 3:
        return head + piece * chance.choice((2, 3, 50)) + tail
    if how == 4:
        return head
    if how == 5:
        return head + chance.choice(seeds)[start:]
    if how == 6:
        return (
            head + struct.pack(chance.choice("<>") + "Q", chance.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1))) + tail
        )
    if how == 7 and numbers:
        number = chance.choice(numbers)
        other = chance.choice((0, 1, int(number[0][:30]) + chance.choice((-1, 1)), 2**31, 2**63, 10**12))
        return data[: number.start()] + str(other).encode() + data[number.end() :]
    if how == 8:  # swap two lines
        lines = data.split(b"\n")
        a, b = chance.randrange(len(lines)), chance.randrange(len(lines))
        lines[a], lines[b] = lines[b], lines[a]
        return b"\n".join(lines)
    return head + chance.choice(_PIECES) + tail


def _inside_zip(data: bytes, chance: random.Random) -> bytes:
    """Change one member and pack again, so that lengths and check sums are right."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except Exception:  # damaged by an earlier change
        return data
    if not members:
        return data
    chosen = chance.choice(list(members))
    if chance.random() < 0.1:
        members[chosen + "x"] = members.pop(chosen)
    else:
        members[chosen] = _anywhere(members[chosen], list(members.values()), chance)
    file = io.BytesIO()
    with (
        warnings.catch_warnings(),
        zipfile.ZipFile(file, "w", chance.choice((0, 0, zipfile.ZIP_DEFLATED))) as archive,
    ):
        warnings.simplefilter("ignore")
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def _inside_safetensors(data: bytes, seeds: list[bytes], chance: random.Random) -> bytes:
    """Change the header or the tensors, then state the right length and the right SHA-256."""
    length = int.from_bytes(data[:8], "little")
    header, content = data[8 : 8 + length], data[8 + length :]
    if chance.random() < 0.8:
        header = _anywhere(header, [seed[8:] for seed in seeds], chance)
    else:
        content = _anywhere(content, seeds, chance)
    start = struct.pack("<Q", len(header)) + header
    seal = rb'"ssdkd.sha256":"[^"]{64}"'
    start = re.sub(seal, b'"ssdkd.sha256":"' + b"0" * 64 + b'"', start, count=1)
    digest = hashlib.sha256(start + content).hexdigest().encode()
    return re.sub(seal, b'"ssdkd.sha256":"' + digest + b'"', start, count=1) + content


# ----------------------------------------------------------------------------------------------------
# Running cases
# ----------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What became of the cases of one target."""

    cases: int = 0
    taken: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    mib: float = 0.0
    findings: list[str] = field(default_factory=list)


class TooSlow(BaseException):
    """Raised by the alarm; no reader catches it."""


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise TooSlow(f"took more than {seconds} s")

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def content_of(target: Target, seeds: list[bytes], seed: int, case: int) -> bytes:
    chance = random.Random(f"{seed} {target.name} {case}")
    return changed(chance.choice(seeds), seeds, chance)


def run_cases(
    target: Target, seeds: list[bytes], seed: int, cases: range, folder: Path, trace: Path, pipe: Connection
) -> None:
    """Run the cases of one process; sends (case, seconds, outcome, peak) for each before the next begins."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if sys.platform == "linux":  # for this machine's sake
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 4 * MOST_MIB * 2**20,) * 2)
    path = folder / f"{os.getpid()}{target.suffix}"
    start_mib = peak_mib()
    for case in cases:
        path.write_bytes(content_of(target, seeds, seed, case))
        start, before = time.perf_counter(), peak_mib()
        try:
            with alarm(MOST_SECONDS):
                target.read(path)
            outcome = "taken"
        except SsdkdError as error:
            outcome = "refused" if str(error) and len(str(error)) < 5000 else f"message of {len(str(error))} characters"
        except (Exception, TooSlow) as error:
            outcome = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        if trace.exists():
            outcome = "CODE RAN"
            trace.unlink()
        elif peak_mib() - before > MOST_MIB:
            outcome = f"took {peak_mib() - before:.0f} MiB"
        pipe.send((case, time.perf_counter() - start, outcome, peak_mib() - start_mib))
    path.unlink(missing_ok=True)


def fuzz(target: Target, seed: int, count: int, workers: int) -> Tally:
    """Run `count` cases of one target in `workers` processes; where one dies, the next goes on behind it."""
    tally, began = Tally(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ssdkd-fuzz-") as name:
        folder = Path(name)
        traces = [folder / f"trace{worker}" for worker in range(workers)]
        require_live_baits(traces[0])
        running: dict[Any, tuple[Any, range, Path, float]] = {}

        def start(cases: range, trace: Path) -> None:
            receiver, sender = multiprocessing.Pipe(duplex=False)
            arguments = (target, target.seeds(trace), seed, cases, folder, trace, sender)
            process = multiprocessing.get_context("fork").Process(target=run_cases, args=arguments)
            process.start()
            sender.close()
            running[receiver] = (process, cases, trace, time.perf_counter())

        for worker, trace in enumerate(traces):
            start(range(worker, count, workers), trace)
        while running:
            for process, _, _, heard in running.values():  # the alarm does not ring inside of a C function
                if time.perf_counter() - heard > 2 * MOST_SECONDS:
                    process.kill()
            ready: Any
            for ready in wait(list(running), timeout=1):
                process, cases, trace, _ = running[ready]
                try:
                    case, seconds, outcome, mib = ready.recv()
                except EOFError:
                    del running[ready]
                    process.join()
                    if not cases:
                        continue
                    case, seconds, outcome, mib = cases[0], 0.0, _end_of(process.exitcode), 0.0
                    start(cases[1:], trace)
                else:
                    running[ready] = (process, cases[1:], trace, time.perf_counter())
                tally.cases += 1
                tally.taken += outcome == "taken"
                tally.refused += outcome == "refused"
                tally.slowest, tally.mib = max(tally.slowest, seconds), max(tally.mib, mib)
                if outcome not in ("taken", "refused"):
                    tally.findings.append(f"--target {target.name!r} --case {case}: {outcome}")
    tally.seconds = time.perf_counter() - began
    return tally


def _end_of(exit_code: int | None) -> str:
    killed = exit_code == -signal.SIGKILL
    return f"took more than {2 * MOST_SECONDS} s or all memory" if killed else f"the process died ({exit_code})"


def repeat(target: Target, seed: int, case: int) -> int:
    """Run one case here, with its traceback and its file."""
    folder = Path(tempfile.mkdtemp(prefix="ssdkd-fuzz-"))
    # The paths in the baits have the length that they had, so that the same changes hit the same places.
    path, trace = folder / f"case{target.suffix}", folder / "trace0"
    path.write_bytes(content_of(target, target.seeds(trace), seed, case))
    print(f"{path}, {path.stat().st_size} bytes")
    try:
        with alarm(MOST_SECONDS):
            print("taken:", str(target.read(path))[:200])
    except SsdkdError as error:
        print(f"refused: {str(error)[:2000]}")
    except (Exception, TooSlow):
        lines = traceback.format_exc().splitlines()
        print("\n".join(line[:200] for line in lines[:60]))
        return 1
    return int(trace.exists())


def run() -> int:
    parser = Parser(
        prog="python -m benchmarks.fuzz", description="Damaged and hostile files for every reader of ssdkd."
    )
    parser.add_argument("--cases", type=int, default=100_000, help="all targets together (default: 100000)")
    parser.add_argument("--seed", type=int, default=0, help="every case follows from it (default: 0)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--target", choices=[target.name for target in TARGETS], help="only this one")
    parser.add_argument("--case", type=int, help="repeat this case of the target and show it")
    given = parser.parse_args()
    require_at_least(given, workers=1, cases=1)
    chosen = [target for target in TARGETS if given.target in (None, target.name)]
    if given.case is not None:
        if given.target is None:
            parser.error("--case needs --target")
        return repeat(chosen[0], given.seed, given.case)

    print(f"{'target':22}{'cases':>8}{'taken':>8}{'refused':>9}{'findings':>10}{'s':>7}{'slowest ms':>12}{'MiB':>6}")
    findings: list[str] = []
    for number, target in enumerate(chosen):
        count = given.cases // len(chosen) + (number < given.cases % len(chosen))
        tally = fuzz(target, given.seed, count, given.workers)
        print(
            f"{target.name:22}{tally.cases:8}{tally.taken:8}{tally.refused:9}{len(tally.findings):10}"
            f"{tally.seconds:7.0f}{tally.slowest * 1000:12.0f}{tally.mib:6.0f}",
            flush=True,
        )
        for finding in tally.findings[:FINDINGS_SHOWN]:
            print(f"    {finding}")
        if len(tally.findings) > FINDINGS_SHOWN:
            print(f"    and {len(tally.findings) - FINDINGS_SHOWN} more")
        findings += tally.findings
    print(f"{len(findings)} findings" if findings else "only SsdkdError came out, and no code ran")
    return 1 if findings else 0


def main() -> int:
    """The command; a user's mistake is one sentence and exit code 2."""
    try:
        return run()
    except SsdkdError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
