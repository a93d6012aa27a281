"""llm.c's own binary (train_gpt2cu) behind the protocol: started anew each turn on random tokens, its printed times taken.

Where the binary knows it (-ge 2), its products take GELU along, forward and backward, if a first run shows that to be faster on this
device: on Hopper it may be, and the binary does not do so by itself. The first two steps of each start are left out. What it does is read from the table that it prints. Its times are those of CUDA's
events around a step, in which it reads the batch from the file, copies it to the device, and reads loss and norm back.
"""

import array
import math
import os
import random
import re
import statistics
import struct
import subprocess
import sys
import tempfile

import common

# The first 256 integers of a file of tokens: a mark, the version, the number of tokens.
MARK, VERSION, HEADER = 20240520, 1, 256
LEFT_OUT = 2
STEP = re.compile(r"^step\s+\d+/\d+ \| loss\s+(\S+).*?\| norm\s+(\S+).*?\|\s*([0-9.]+) ms \|")
ROW = re.compile(r"^\| ([^|]+?)\s+\| (.*?)\s*\|$")


def write_tokens(path, samples, context, vocabulary):
    """Samples of `context` tokens, and the last one's target; gives how many samples the file holds."""
    with open(path, "wb") as file:
        file.write(struct.pack(f"<{HEADER}i", MARK, VERSION, samples * context + 1, *[0] * (HEADER - 3)))
        for count in [context] * samples + [1]:
            tokens = array.array("H", random.choices(range(vocabulary), k=count))
            if sys.byteorder == "big":
                tokens.byteswap()
            tokens.tofile(file)
        return (file.tell() - 4 * HEADER) // (2 * context)


def run(asked, data, steps, more=()):
    """The table that a run prints, the seconds of its steps, and whether the losses and norms of all are finite."""
    fixed = "-v 1000000 -m 0 -s 0 -h 0 -c 0.1 -r 0 -e d12"
    given = f"-i {data} -j {data} -b {asked.batch} -t {asked.context} -x {steps + LEFT_OUT}"
    command = [asked.binary, *fixed.split(), *given.split(), *more]
    output = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if output.returncode != 0:
        sys.exit(f"{asked.binary} ended with {output.returncode}: {(output.stderr or output.stdout).strip()[-200:]}")
    lines = output.stdout.splitlines()
    table = dict(row.groups() for row in map(ROW.match, lines) if row)
    rows = [[float(value) for value in step.groups()] for step in map(STEP.match, lines) if step]
    finite = all(math.isfinite(loss) and math.isfinite(norm) for loss, norm, _ in rows)
    return table, [milliseconds / 1e3 for _, _, milliseconds in rows][LEFT_OUT:], finite


def faster(asked, data):
    """Arguments of the faster form, what it is called, and what its first run gave."""
    plain = run(asked, data, 3)
    fused = ["-ge", "2"]
    try:
        other = run(asked, data, 3, fused)
    except SystemExit:
        # An older binary does not know the argument.
        return [], "as given", plain
    if statistics.median(other[1]) < statistics.median(plain[1]):
        return fused, "as given, GELU in its products", other
    return [], "as given", plain


def main():
    asked = common.arguments(["built"], binary=True)
    if not os.access(asked.binary, os.X_OK):
        common.missing(f"{asked.binary} is no program: give llm.c's train_gpt2cu")
    with tempfile.TemporaryDirectory() as folder:
        data = os.path.join(folder, "tokens.bin")
        samples = write_tokens(data, asked.samples, asked.context, 50257)
        more, version, (table, times, finite) = faster(asked, data)
        shape = [int(table["micro batch size B"]), int(table["sequence length T"])]
        work = {
            "name": "gpt2",
            "parameters": int(table["num_parameters"]),
            "inputs": shape,
            "samples": samples,
            "precision": table["precision"].lower().replace("fp", "f"),
            # Its rule and its clip cannot be chosen.
            "update": "adamw+global_norm",
            "threads": 0,
        }
        common.say({"peer": "llm.c", "version": version, "work": work})
        for seconds in common.requests():
            if seconds is None:
                common.say({"finite": finite})
                continue
            steps = max(5, math.ceil(seconds / times[-1]))
            _, times, of_this = run(asked, data, steps, more)
            finite = finite and of_this
            common.say({"times": times})


main()
