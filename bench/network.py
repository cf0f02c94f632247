"""Fit an alpha-beta model of gloo's ring all-reduce to some links and message sizes, and test it on others.

python bench/network.py [--repeats 7] [--json FILE]; needs root, `ip` and `tc`.

Machines are network namespaces on a bridge; `tc … tbf` limits the rate at which each of them sends. Combinations with
a HELD_OUT_* value are never used for the fit. Prints predicted / measured for each, and the two fitted numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

FITTED_RATES_MBIT, HELD_OUT_RATES_MBIT = (50, 200), (100,)
FITTED_SIZES, HELD_OUT_SIZES = (2**14, 2**18, 2**22), (2**20, 2**21)
FITTED_MACHINES, HELD_OUT_MACHINES = (2, 4), (3,)
BURST_BYTES = 8192
"""Bytes that an idle link passes at once, far less than a message."""


class Measured(NamedTuple):
    """Median time of an all-reduce of `num_bytes` between `machines`, each of which sends at `rate_mbit`."""

    machines: int
    rate_mbit: float
    num_bytes: int
    seconds: float


class Link(NamedTuple):
    """Fitted model: 2 (p - 1) (alpha + n / p * overhead / rate), for p machines and n bytes."""

    alpha_s: float
    """Latency of one step of the ring, in seconds."""
    overhead: float
    """Bytes on the wire for each byte of the message."""

    def seconds(self, machines: int, rate_mbit: float, num_bytes: int) -> float:
        """Predict the time of an all-reduce."""
        steps = 2 * (machines - 1)
        return steps * (self.alpha_s + num_bytes / machines * self.overhead * 8e-6 / rate_mbit)


def fit(rows: Sequence[Measured]) -> Link:
    """Fit by least squares of the relative errors; the model is linear in both numbers."""
    steps = np.array([2 * (row.machines - 1) for row in rows])
    wire_s = np.array([row.num_bytes / row.machines * 8e-6 / row.rate_mbit for row in rows])
    seconds = np.array([row.seconds for row in rows])
    design = np.stack([steps, steps * wire_s], axis=1) / seconds[:, None]
    (alpha_s, overhead), *_ = np.linalg.lstsq(design, np.ones(len(rows)))
    return Link(float(alpha_s), float(overhead))


class Lab:
    """Machines on a bridge: network namespaces with one rate-limited link each."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def run(self, machine: int, *command: str) -> subprocess.Popen[str]:
        """Start a command on a machine, with pipes to its input and from its output."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[machine], *command],
            env={**os.environ, "GLOO_SOCKET_IFNAME": "net0", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def limit_rate(self, rate_mbit: float) -> None:
        """Limit the rate at which each machine sends."""
        for name in self.names:
            shape = f"tbf rate {rate_mbit}mbit burst {BURST_BYTES} limit {2**26}"
            _run(f"tc -n {name} qdisc replace dev net0 root {shape}")


@contextmanager
def lab(machines: int) -> Iterator[Lab]:
    """Create the machines, and remove them when the block ends."""
    hub = f"bench-{os.getpid()}-hub"
    names = [f"bench-{os.getpid()}-{machine}" for machine in range(machines)]
    with ExitStack() as stack:
        for name in (hub, *names):
            _run(f"ip netns add {name}")
            stack.callback(_run, f"ip netns delete {name}")
            _run(f"ip -n {name} link set lo up")
        _run(f"ip -n {hub} link add bridge type bridge")
        _run(f"ip -n {hub} link set bridge up")
        for machine, name in enumerate(names):
            _run(f"ip link add net0 netns {name} type veth peer name port{machine} netns {hub}")
            _run(f"ip -n {hub} link set port{machine} master bridge up")
            _run(f"ip -n {name} address add 10.92.0.{machine + 1}/24 dev net0")
            _run(f"ip -n {name} link set net0 up")
        yield Lab(names)


def measure(machines: int, rates_mbit: Sequence[float], sizes: Sequence[int], repeats: int) -> Iterator[Measured]:
    """Time all-reduces between `machines` machines, for every rate and size."""
    with lab(machines) as machines_lab:
        command = (sys.executable, __file__, "--worker")
        workers = [machines_lab.run(rank, *command, f"{rank},{machines}") for rank in range(machines)]
        try:
            for rate_mbit in rates_mbit:
                machines_lab.limit_rate(rate_mbit)
                for num_bytes in sizes:
                    for worker in workers:
                        print(num_bytes, repeats, file=worker.stdin, flush=True)
                    answers = [worker.stdout.readline() for worker in workers if worker.stdout is not None]
                    yield Measured(machines, rate_mbit, num_bytes, max(map(float, answers)))
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()


def work(rank: int, machines: int) -> None:
    """Run the process of one machine: for each input line `BYTES REPEATS`, print the median time of an all-reduce."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method="tcp://10.92.0.1:29540", rank=rank, world_size=machines)
    for line in sys.stdin:
        num_bytes, repeats = map(int, line.split())
        message = torch.zeros(num_bytes // 4)
        times_s = []
        for repeat in range(repeats + 1):
            dist.barrier()
            began_s = time.perf_counter()
            dist.all_reduce(message)
            if repeat:
                times_s.append(time.perf_counter() - began_s)
        print(statistics.median(times_s), flush=True)


def _run(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True)


def main() -> None:
    """Measure, fit the model to some measurements, and predict the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="file to write every ratio to")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(*map(int, arguments.worker.split(",")))
        return
    fitted: list[Measured] = []
    held_out: list[Measured] = []
    for machines in FITTED_MACHINES:
        fitted += measure(machines, FITTED_RATES_MBIT, FITTED_SIZES, arguments.repeats)
    for machines in (*FITTED_MACHINES, *HELD_OUT_MACHINES):
        held_out += measure(machines, HELD_OUT_RATES_MBIT, HELD_OUT_SIZES, arguments.repeats)
    link = fit(fitted)
    print(f"alpha {link.alpha_s * 1e6:.0f} us per step of the ring, {link.overhead:.3f} bytes on the wire per byte")
    report = []
    for kind, rows in (("fitted", fitted), ("held out", held_out)):
        for row in rows:
            ratio = link.seconds(*row[:3]) / row.seconds
            report.append({"kind": kind, **row._asdict(), "predicted_by_measured": ratio})
            where = f"{row.machines} machines, {row.rate_mbit:g} Mbit/s, {row.num_bytes / 2**10:.0f} KiB"
            print(f"{kind:>9}: {where:<40} predicted / measured {ratio:.2f}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({**link._asdict(), "rows": report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
