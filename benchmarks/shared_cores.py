"""What a training on the CPU loses to other programs on the same cores, by how its threads wait for each other.

    python benchmarks/shared_cores.py --threads 2 --busy 0,1,2

Training steps of the demo set's detector (ResNet-18, 4 images of 128 x 128 pixels) while ``--busy`` other processes
compute without a pause. The arms, each a process of its own (the last one: several), take turns; the order alternates:

- libgomp's default: a thread that waits for the last one of an operation spins for 300,000 turns, several milliseconds;
- retinaflow's default: 2,000 turns (``retinaflow/__init__.py``);
- OMP_WAIT_POLICY=passive: none, it sleeps at once;
- one thread;
- side by side: a training of one thread for each of the ``--threads``, as ``main`` does with its two trainings.

Printed per arm: median images a second, their ratio to libgomp's default at the same load (median over rounds), and to
the same arm on free cores. A fair scheduler leaves T threads beside B busy processes on C cores C / (T + B) of a core
each, at most 1.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

SIZE, BATCH, CLASSES = 128, 4, 20
BUSY = "while True: pass"


@dataclass
class Arm:
    """Processes that train, and images a second of each round by the number of busy processes."""

    name: str
    processes: list[subprocess.Popen[str]]
    found: dict[int, list[float]] = field(default_factory=dict)

    @staticmethod
    def start(name: str, processes: int = 1, **environment: str) -> Arm:
        given = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
        started = [
            subprocess.Popen(
                [sys.executable, __file__, "--serve"],
                env={**given, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(processes)
        ]
        arm = Arm(name, started)
        arm.train(1)
        return arm

    def train(self, steps: int) -> float:
        """Images a second over some steps of each process."""
        start = time.perf_counter()
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{steps}\n")
            process.stdin.flush()
        for process in self.processes:
            assert process.stdout is not None
            process.stdout.readline()
        return BATCH * steps * len(self.processes) / (time.perf_counter() - start)


def main() -> None:
    arguments = parse()
    if arguments.serve:
        serve()
        return
    threads = {"OMP_NUM_THREADS": str(arguments.threads)}
    arms = [
        Arm.start("libgomp's default", GOMP_SPINCOUNT="300000", **threads),
        Arm.start("retinaflow's default", **threads),
        Arm.start("OMP_WAIT_POLICY=passive", OMP_WAIT_POLICY="passive", **threads),
        Arm.start("one thread", OMP_NUM_THREADS="1"),
        Arm.start("side by side", arguments.threads, OMP_NUM_THREADS="1"),
    ]
    try:
        for busy in map(int, arguments.busy.split(",")):
            measure(arms, busy, arguments.rounds, arguments.steps)
            report(arms, busy, arguments.threads)
    finally:
        for process in (process for arm in arms for process in arm.processes):
            process.kill()


def measure(arms: Sequence[Arm], busy: int, rounds: int, steps: int) -> None:
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
    try:
        for turn in range(rounds):
            for arm in arms if turn % 2 == 0 else arms[::-1]:
                arm.found.setdefault(busy, []).append(arm.train(steps))
    finally:
        for other in others:
            other.kill()


def report(arms: Sequence[Arm], busy: int, threads: int) -> None:
    cores = len(os.sched_getaffinity(0))
    print(f"\n{threads} threads and {busy} busy processes on {cores} cores")
    peer = arms[0].found[busy]
    for arm in arms:
        own = arm.found[busy]
        line = f"  {arm.name:<24} {statistics.median(own):5.1f} images/s"
        line += f", {statistics.median(a / b for a, b in zip(own, peer, strict=True)):.2f} times libgomp's default"
        if 0 in arm.found and busy:
            line += f", {statistics.median(own) / statistics.median(arm.found[0]):.0%} of free cores"
        print(line, flush=True)


def serve() -> None:
    """Answer each line of the input, a number of steps, when they are done."""
    # First, as it decides how threads wait before torch is loaded.
    import retinaflow  # noqa: F401, I001
    from training_step import NetworkSettings, build_retinaflow

    network = NetworkSettings(backbone="resnet18", anchor_scale=3.0, head_norm="group", head_depth=2, fpn_channels=64)
    step = build_retinaflow(CLASSES, SIZE, BATCH, "float32", network)
    for line in sys.stdin:
        for _ in range(int(line)):
            step()
        print("done", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", default="0,1,2", help="numbers of busy processes, the first one 0")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
