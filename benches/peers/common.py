"""What the peers share: arguments, timing, and the line of JSON that `warpstep bench --json` prints too."""

import argparse
import json
import statistics
import time

import torch


def setup():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments


def measure(step, seconds):
    """Seconds of each repetition, for about `seconds` after a warm-up of a tenth of it (20 repetitions at least)."""
    began = time.perf_counter()
    warm = 0
    while warm < 20 and (warm < 3 or time.perf_counter() - began < max(seconds / 10, 0.5)):
        step()
        warm += 1
    times = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(times) < 5:
        one = time.perf_counter()
        step()
        times.append(time.perf_counter() - one)
    return times


def report(name, times):
    print(
        json.dumps(
            {
                "name": name,
                "device": f"PyTorch {torch.__version__} eager, CPU, {torch.get_num_threads()} threads",
                "count": len(times),
                "median_ms": statistics.median(times) * 1e3,
                "min_ms": min(times) * 1e3,
            }
        )
    )
