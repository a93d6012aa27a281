#!/usr/bin/env python3
"""What several processes over MPI cost on one machine, as ratios, and the bytes that they send, beside a ring's minimum.

    cargo build --release --features mpi
    python3 benches/parallel.py [--binary target/release/warpstep] [--turns 5] [--steps 200] > table.md

Each process has one thread. Commands are run in turn, A B A B, and ratios are taken turn by turn: medians, with the quartiles in
brackets. Bytes are counted by the loopback interface of a network namespace that holds nothing else (Linux, root), the processes
speaking TCP; two lengths of the same run are counted, so that what is sent once does not count. Needs no package.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

MLP = """
[run]
steps = {steps}
log_every_steps = 1000
[data]
format = "digits"
batch_size = {batch}
[model]
preset = "mlp"
hidden = [1024, 1024]
[optimizer]
rule = "momentum"
learning_rate = 0.01
clip = {{ global_norm = 1.0 }}
[evaluate]
every_steps = 0
[checkpoint]
every_steps = 0
"""

GPT = """
[run]
steps = {steps}
log_every_steps = 1000
[data]
format = "text"
path = "text.txt"
batch_size = {batch}
context = 64
[model]
preset = "gpt"
layers = 4
heads = 4
width = 128
[optimizer]
rule = "adamw"
learning_rate = 1e-3
clip = {{ global_norm = 1.0 }}
[evaluate]
every_steps = 0
[checkpoint]
every_steps = 0
"""

WORKS = {"mlp 64-1024-1024-10": (MLP, 128), "gpt 4 x 128, context 64": (GPT, 12)}


def mpirun(processes: int) -> list:
    version = subprocess.run(["mpirun", "--version"], capture_output=True, text=True).stdout
    options = ["--oversubscribe", "--bind-to", "none"] if "Open MPI" in version else []
    if options and os.geteuid() == 0:
        options.append("--allow-run-as-root")
    return ["mpirun", *options, "-n", str(processes)]


class Bench:
    def __init__(self, binary: str, folder: Path):
        self.binary, self.folder, self.count = binary, folder, 0
        letters = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(200_000))
        (folder / "text.txt").write_text(letters)

    def train(self, work: str, processes: int, batch: int, steps: int, more=(), before=(), options=()) -> dict:
        """Trains, and gives back summary.json."""
        self.count += 1
        out = self.folder / f"out{self.count}"
        file = self.folder / "run.toml"
        file.write_text(WORKS[work][0].format(steps=steps, batch=batch))
        command = [self.binary, "train", str(file), "--quiet", "--threads", "1", "--out", str(out), *more]
        if processes > 1:
            command = [*mpirun(processes), *options, *command]
        subprocess.run([*before, *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        summary = json.loads((out / "summary.json").read_text())
        shutil.rmtree(out)
        return summary

    def seconds(self, *args, **kwargs) -> float:
        return 1.0 / self.train(*args, **kwargs)["steps_per_s"]

    def in_turn(self, turns: int, first, second) -> list:
        """Ratios of the second's seconds to the first's, turn by turn."""
        first(), second()
        return [(lambda a, b: b / a)(first(), second()) for _ in range(turns)]

    def sent(self, work: str, processes: int, batch: int, steps: int, more=()) -> tuple:
        """Bytes that each process sends in a step, and the parameters."""
        # The counter stands in the namespace: it is read there, before and after.
        counted, parameters = [], 0
        for length in (steps, 2 * steps):
            report = self.folder / "bytes"
            script = 'ip link set lo up; "$@"; grep lo: /proc/net/dev > "$REPORT"'
            os.environ["REPORT"] = str(report)
            before = ["unshare", "-n", "sh", "-c", script, "sh"]
            tcp = ["--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", "lo", "--mca", "pml", "ob1"]
            summary = self.train(work, processes, batch, length, more=more, before=before, options=tcp)
            counted.append(int(report.read_text().split()[1]))
            parameters = summary["parameters"]
        return (counted[1] - counted[0]) / steps / processes, parameters


def told(values: list) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default="target/release/warpstep")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    if not shutil.which("mpirun"):
        sys.exit("mpirun is not on the path: install Open MPI or MPICH")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {options.turns} turns of {options.steps} steps\n")
    print("| work | what | ratio of times |")
    print("| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(str(Path(options.binary).resolve()), Path(name))
        for work, (_, batch) in WORKS.items():
            n, turns = options.steps, options.turns
            one = lambda: bench.seconds(work, 1, batch, n)
            two = lambda: bench.seconds(work, 2, 2 * batch, n)
            print(f"| {work} | 2 processes over 1, as much work in each | {told(bench.in_turn(turns, one, two))} |", flush=True)
            half = lambda: bench.seconds(work, 2, batch, n)
            print(f"| {work} | 2 processes over 1, the work shared | {told(bench.in_turn(turns, one, half))} |", flush=True)
            waits = lambda: bench.seconds(work, 2, 2 * batch, n, more=["--set", "parallel.overlap=false"])
            print(f"| {work} | without overlap over with | {told(bench.in_turn(turns, two, waits))} |", flush=True)
            same = lambda: bench.seconds(work, 2, 2 * batch, n, more=["--set", "run.reproducible=true", "--set", "parallel.parts=2"])
            print(f"| {work} | reproducible in 2 parts over not | {told(bench.in_turn(turns, two, same))} |", flush=True)
        print("\n| work | processes | sums | sent by each in a step | a ring's minimum | over it |")
        print("| --- | --- | --- | --- | --- | --- |")
        for work, (_, batch) in WORKS.items():
            for processes in (2, 4):
                for kind, more in (("free", []), ("reproducible", ["--set", "run.reproducible=true", "--set", "parallel.parts=4"])):
                    sent, parameters = bench.sent(work, processes, 4 * batch, 50, more)
                    least = 2 * (processes - 1) / processes * 4 * parameters
                    print(f"| {work} | {processes} | {kind} | {sent / 1e6:.3f} MB | {least / 1e6:.3f} MB | {sent / least:.3f} |", flush=True)


if __name__ == "__main__":
    main()
