"""clip_grad_norm_ and fused SGD with momentum over 50M parameters in PyTorch."""

import torch
from common import measure, report, setup

arguments = setup()
COUNT = 50_000_000
parameters = [torch.nn.Parameter(torch.full((COUNT // 50,), 0.5)) for _ in range(50)]
for parameter in parameters:
    parameter.grad = torch.rand_like(parameter) - 0.5
optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, fused=True)


def step():
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


report("update", measure(step, arguments.seconds))
