"""The protocol that every peer speaks with `warpstep bench --peers`, one line of JSON at a time.

A peer is a process. It first declares what it does, or says what is missing:

    {"peer": "PyTorch eager", "version": "2.15.0", "work": {"name": "mlp", "parameters": 235146, "inputs": [128, 784],
     "samples": 21376, "precision": "f32", "update": "momentum+global_norm", "threads": 2}}
    {"missing": "torch is not installed: pip install torch"}

Then it reads lines `run SECONDS` and answers each with the seconds of every repetition, `{"times": [..]}`. The line `check`, behind
the last turn, asks whether it computed numbers at all: `{"finite": true}` where the last loss (of an update: the last norm) and every
parameter are finite numbers, else `{"finite": false}`. It ends at the end of its input. What it declares it counts from its own
tensors: Warpstep refuses a peer that does other work than its own, and one whose numbers are not finite.
"""

import argparse
import json
import math
import os
import sys
import time

# nanoGPT's configuration for CPUs, and GPT-2 124M with its vocabulary padded to a multiple of 64.
GPT = {
    "gpt_cpu": {"vocabulary": 65, "layers": 4, "heads": 4, "width": 128, "bias": False},
    "gpt2": {"vocabulary": 50304, "layers": 12, "heads": 12, "width": 768, "bias": True},
}
# Shape of a sample, and number of classes: those of MNIST, of half a second of spoken digits, and of ImageNet.
CLASSIFIED = {
    "mlp": ((784,), 10),
    "cnn": ((1, 28, 28), 10),
    "audio_cnn": ((8000,), 10),
    "resnet18": ((3, 224, 224), 1000),
}
# Log-mel pictures of waveforms, and how they are normalized; channels of the network's stages, and what of its mean is dropped.
MEL = {"rate": 16_000, "window": 512, "hop": 160, "bands": 40, "floor": 1e-6, "scale": 0.25, "shift": 1.0}
AUDIO_STAGES, AUDIO_DROPOUT = (16, 32, 64), 0.2
# Channels of each two blocks of ResNet-18, and the first one's stride.
STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))
# The update of each work where none is asked for, in the words of `results::Work`.
UPDATES = {
    "mlp": "momentum+global_norm",
    "cnn": "momentum+global_norm",
    "audio_cnn": "adamw+global_norm",
    "resnet18": "momentum+global_norm",
    "gpt_cpu": "adamw+global_norm",
    "gpt2": "adamw+global_norm",
    "update": "momentum+global_norm",
}
MAX_NORM, MOMENTUM, BETAS, DECAY = 1.0, 0.9, (0.9, 0.99), 0.1
# Samples of a batch and tokens of a sample, where none are asked for.
SHAPES = {"audio_cnn": (32, 0), "resnet18": (4, 0), "gpt_cpu": (12, 64), "gpt2": (64, 1024)}
# Batches that the samples in memory make, where no number of samples is asked for.
BATCHES = 64
# Seconds that a span between two waits has at least: a wait takes long beside the smallest steps. Spans of one repetition whose fastest
# tells how many make one that long, and seconds after which no other of these is begun. So Warpstep's own (measure.rs).
LEAST_SPAN = {"cpu": 50e-6, "cuda": 2e-3}
SINGLE_SPANS, SINGLE_SECONDS = 5, 0.1

# Lines of the protocol alone go to standard output: libraries that print are sent to standard error.
_out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def say(message):
    print(json.dumps(message), file=_out, flush=True)


def missing(reason):
    """Names what is not there, and ends: a peer that cannot run is no failure."""
    say({"missing": reason})
    sys.exit(0)


def arguments(forms, binary=False):
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", required=True, choices=list(UPDATES))
    parser.add_argument("--form", default=forms[0], choices=forms)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="f32")
    parser.add_argument("--update", help="rule and clip, as adamw+global_norm")
    parser.add_argument("--batch", type=int, help="samples of a batch")
    parser.add_argument("--context", type=int, help="tokens of a sample")
    parser.add_argument("--samples", type=int, help="samples in memory that batches are taken from, whole batches")
    parser.add_argument("--parameters", type=int, default=50_000_000, help="of the work `update`")
    if binary:
        parser.add_argument("--binary", required=True, help="the program that does the work")
    found = parser.parse_args()
    found.update = found.update or UPDATES[found.work]
    found.rule, _, clip = found.update.partition("+")
    if found.precision not in ("f32", "tf32", "bf16"):
        missing(f"it does not compute in {found.precision} here")
    if found.rule not in ("momentum", "adamw") or clip != "global_norm":
        missing(f"it does no {found.update} here")
    if found.work == "update" and found.precision == "bf16":
        missing("its optimizers keep no f32 master beside parameters in bf16")
    batch, context = SHAPES.get(found.work, (128, 0))
    found.batch, found.context = found.batch or batch, found.context or context
    # An update takes no batch.
    found.samples = 0 if found.work == "update" else found.samples or BATCHES * found.batch
    return found


def pieces(parameters):
    """Sizes of the tensors of the work `update`: as many as a model of that size would have, of about a million values."""
    count = max(1, round(parameters / 1_000_000))
    return [parameters // count + (i < parameters % count) for i in range(count)]


def triangles():
    """Weights of each mel band, `[bands, window / 2 + 1]`: triangles of height 1 on HTK's scale."""
    bins = MEL["window"] // 2 + 1
    step = 2595 * math.log10(1 + MEL["rate"] / 2 / 700) / (MEL["bands"] + 1)
    corners = [700 * (10 ** (i * step / 2595) - 1) for i in range(MEL["bands"] + 2)]
    frequencies = [i * MEL["rate"] / MEL["window"] for i in range(bins)]
    return [
        [max(0.0, min((hz - low) / (middle - low), (high - hz) / (high - middle))) for hz in frequencies]
        for low, middle, high in zip(corners, corners[1:], corners[2:])
    ]


def requests():
    """The seconds of each `run SECONDS`; None for `check`."""
    for line in sys.stdin:
        words = line.split()
        if words == ["check"]:
            yield None
        elif len(words) == 2 and words[0] == "run":
            yield float(words[1])
        else:
            sys.exit(f"found the line {line.strip()!r}, expected `run SECONDS` or `check`")


def serve(peer, version, work, step, finite, wait=None):
    """Declares `work`, then answers each `run SECONDS` with times of `step`, and `check` with what `finite` gives: whether the last
    loss and all parameters are finite. Where `step` only queues its work, `wait` returns once all of it is done; it stands within
    every timed span."""
    say({"peer": peer, "version": version, "work": work})
    wait = wait or (lambda: None)
    least_span = LEAST_SPAN["cuda" if work["threads"] == 0 else "cpu"]
    cold = True
    for seconds in requests():
        if seconds is None:
            say({"finite": bool(finite())})
            continue
        # Compilers and allocators settle within the first repetitions; later turns warm the caches alone.
        say({"times": turn(step, wait, seconds, 5 if cold else 1, least_span)})
        cold = False


def turn(step, wait, seconds, warm_up, least_span):
    """Seconds a repetition, of spans that end with a wait each, for about `seconds` after a warm-up of a tenth of it, the fastest
    repetition of which tells how many make a span."""

    def span(count):
        began = time.perf_counter()
        for _ in range(count):
            step()
        wait()
        return (time.perf_counter() - began) / count

    one, done, began = math.inf, 0, time.perf_counter()
    while done < warm_up or time.perf_counter() - began < max(seconds / 10, SINGLE_SECONDS if done < SINGLE_SPANS else 0.0):
        one, done = min(one, span(1)), done + 1
    count = max(1, math.ceil(least_span / one))
    times, began = [], time.perf_counter()
    while time.perf_counter() - began < seconds or len(times) < 5:
        times.append(span(count))
    return times
