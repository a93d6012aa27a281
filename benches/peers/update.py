"""clip_grad_norm_ and a fused optimizer over 50M parameters in PyTorch, a copy of as many values before each for the floor.

Momentum in 50 tensors is what `warpstep bench update` does; `--all` adds AdamW, and other numbers of tensors.
"""

import statistics
import time

import torch
from common import measure, report, setup

COUNT = 50_000_000
arguments = setup(("--all", "momentum and AdamW, in 1, 50 and 1,000 tensors"))


def timed(name, tensors, make, bytes_a_parameter):
    parameters = [torch.nn.Parameter(torch.full((COUNT // tensors,), 0.5)) for _ in range(tensors)]
    for parameter in parameters:
        parameter.grad = torch.rand_like(parameter) - 0.5
    optimizer = make(parameters)
    source, target = torch.full((COUNT,), 0.1), torch.zeros(COUNT)
    copies, updates = [], []

    def step():
        began = time.perf_counter()
        target.copy_(source)
        middle = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        copies.append(middle - began)
        updates.append(time.perf_counter() - middle)

    count = len(measure(step, arguments.seconds))
    copy = statistics.median(copies[-count:])
    report(
        name,
        updates[-count:],
        tensors=tensors,
        bytes=bytes_a_parameter * COUNT,
        copy_gb_per_s=8 * COUNT / copy / 1e9,
        floor_ms=bytes_a_parameter / 8 * copy * 1e3,
    )


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, fused=True)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1, fused=True)


if arguments.all:
    for tensors in (1, 50, 1000):
        timed(f"update_adamw_{tensors}", tensors, adamw, 32)
    for tensors in (1, 1000):
        timed(f"update_momentum_{tensors}", tensors, momentum, 24)
timed("update", 50, momentum, 24)
