"""MNIST's perceptron (784-256-128-10, batch 128) in PyTorch eager: forward, cross-entropy, backward, clip, momentum."""

import torch
from common import measure, report, setup

arguments = setup()
torch.manual_seed(1)
model = torch.nn.Sequential(
    torch.nn.Linear(784, 256), torch.nn.ReLU(), torch.nn.Linear(256, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
)
parameters = list(model.parameters())
optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, fused=True)
x, y = torch.rand(128, 784), torch.randint(10, (128,))


def step():
    loss = torch.nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return loss.item()


report("mlp", measure(step, arguments.seconds))
