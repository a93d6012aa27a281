"""Runs Warpstep and its peers in turn (A B A B ..) and prints the ratios of their medians, round by round.

    python benches/peers/compare.py                    # all, 5 rounds of 4 seconds each
    python benches/peers/compare.py mlp --rounds 9
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
NAMES = ["gpt_cpu", "mlp", "update"]

parser = argparse.ArgumentParser()
parser.add_argument("names", nargs="*", default=NAMES)
parser.add_argument("--warpstep", default=str(HERE.parent.parent / "target" / "release" / "warpstep"))
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--seconds", type=float, default=4.0)
parser.add_argument("--threads", type=int, default=2)
arguments = parser.parse_args()


def run(command):
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


print("| work | peer, ms | Warpstep, ms | times as fast (each round) | share of the copy floor |")
print("| --- | --- | --- | --- | --- |")
for name in arguments.names or NAMES:
    options = ["--seconds", str(arguments.seconds), "--threads", str(arguments.threads)]
    pairs = []
    for _ in range(arguments.rounds):
        ours = run([arguments.warpstep, "bench", name, "--json", *options])
        peer = run([sys.executable, str(HERE / f"{name}.py"), *options])
        pairs.append((peer, ours))
    ratios = [peer["median_ms"] / ours["median_ms"] for peer, ours in pairs]
    floors = [ours["floor_ms"] / ours["median_ms"] for _, ours in pairs if ours.get("floor_ms")]
    floor = f"{100 * statistics.median(floors):.0f} %" if floors else ""
    print(
        f"| {name} | {statistics.median(p['median_ms'] for p, _ in pairs):.2f} "
        f"| {statistics.median(o['median_ms'] for _, o in pairs):.2f} "
        f"| **{statistics.median(ratios):.2f}** ({', '.join(f'{r:.2f}' for r in ratios)}) | {floor} |",
        flush=True,
    )
print(f"\npeer: {pairs[-1][0]['device']}; ours: {pairs[-1][1]['device']}")
