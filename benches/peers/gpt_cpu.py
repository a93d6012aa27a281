"""nanoGPT's configuration for CPUs (4 layers, 4 heads, 128 wide, block 64, batch 12) in PyTorch eager: a whole step."""

import torch
from common import measure, report, setup
from torch import nn
from torch.nn import functional as F

VOCABULARY, TIME, BATCH, LAYERS, HEADS, WIDTH = 65, 64, 12, 4, 4, 128


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return F.layer_norm(x, (WIDTH,), self.weight, None, 1e-5)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_1, self.norm_2 = Norm(), Norm()
        self.packed = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.projection = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        batch, time, width = x.shape
        heads = [
            part.view(batch, time, HEADS, width // HEADS).transpose(1, 2)
            for part in self.packed(self.norm_1(x)).split(width, dim=2)
        ]
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class Gpt(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(TIME, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = Norm()

    def forward(self, x, y):
        hidden = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        logits = F.linear(self.norm(self.blocks(hidden)), self.tokens.weight)
        return F.cross_entropy(logits.view(-1, VOCABULARY), y.view(-1))


arguments = setup()
torch.manual_seed(1)
model = Gpt()
parameters = list(model.parameters())
groups = [
    {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
    {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
]
optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)
x = torch.randint(VOCABULARY, (BATCH, TIME))
y = torch.randint(VOCABULARY, (BATCH, TIME))


def step():
    loss = model(x, y)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return loss.item()


report("gpt_cpu", measure(step, arguments.seconds))
