"""The works in PyTorch: fused optimizers, clipping by foreach, scaled_dot_product_attention; eager, compiled or graphed.

On a GPU, attention is cuDNN's where PyTorch has that for the shapes, else flash attention, and so on: this order where PyTorch lets
it be chosen. Which one it came to stands behind the version.

`eager` is what people write. `compiled` puts two functions through torch.compile: model and loss with their backward, and the clip.
The optimizer's step is left to PyTorch's own fused kernels, which the compiler does not trace into: also in the work `update`, where
clip and step are given to it as one function, the clip is all that it compiles. `graphed` captures the whole of `compiled` as one CUDA
graph, in front of which a batch is gathered.
"""

import contextlib

import common
from common import AUDIO_DROPOUT, AUDIO_STAGES, BETAS, CLASSIFIED, DECAY, GPT, MAX_NORM, MEL, MOMENTUM, STAGES

try:
    import torch
    from torch import nn
    from torch.nn import functional as F
except ImportError:
    common.missing("torch is not installed: pip install torch")

LEARNING_RATE = 1e-4
# Holds the choice of attention until the process ends.
ATTENTION = contextlib.ExitStack()


class Block(nn.Module):
    def __init__(self, width, heads, bias):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width, bias=bias), nn.LayerNorm(width, bias=bias)
        self.packed, self.projection = nn.Linear(width, 3 * width, bias), nn.Linear(width, width, bias)
        self.up, self.down = nn.Linear(width, 4 * width, bias), nn.Linear(4 * width, width, bias)

    def forward(self, x):
        batch, time, width = x.shape
        heads = [
            part.view(batch, time, self.heads, width // self.heads).transpose(1, 2)
            for part in self.packed(self.norm_1(x)).split(width, dim=2)
        ]
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class Gpt(nn.Module):
    def __init__(self, stored, context, vocabulary, layers, heads, width, bias):
        super().__init__()
        self.stored = stored
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, bias) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, bias=bias)

    def forward(self, x):
        # Autocast leaves embeddings in f32, and with them all that is added to them: so the sums along all blocks are stored in
        # 16 bits where products are taken in bf16, as on the other side.
        hidden = (self.tokens(x) + self.positions.weight[: x.shape[1]]).to(self.stored)
        return F.linear(self.norm(self.blocks(hidden)), self.tokens.weight)


def mlp(classes):
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, classes))


def cnn(classes):
    stages, inputs = [], 1
    for channels in (32, 64):
        stages += [nn.Conv2d(inputs, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        inputs = channels
    return nn.Sequential(*stages, nn.Flatten(), nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, classes))


def normed(inputs, channels, kernel, stride=1):
    """A convolution and its batch norm."""
    return nn.Conv2d(inputs, channels, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(channels)


class LogMel(nn.Module):
    """Log-mel pictures `[batch, 1, bands, frames]` of waveforms."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bands", torch.tensor(common.triangles()))
        self.register_buffer("window", torch.hann_window(MEL["window"]))

    def forward(self, x):
        spectrum = torch.stft(x, MEL["window"], MEL["hop"], window=self.window, return_complex=True)
        # As pairs of real numbers: for complex ones the compiler makes no code.
        power = torch.view_as_real(spectrum).square().sum(-1)
        picture = torch.log(self.bands @ power + MEL["floor"]) * MEL["scale"] + MEL["shift"]
        return picture.unsqueeze(1).contiguous(memory_format=torch.channels_last)


def audio_cnn(classes):
    layers, inputs = [LogMel()], 1
    for channels in AUDIO_STAGES:
        layers += [*normed(inputs, channels, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        inputs = channels
    rows = MEL["bands"] // 2 ** len(AUDIO_STAGES)
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d((rows, 1)), nn.Flatten(), nn.Dropout(AUDIO_DROPOUT), nn.Linear(inputs * rows, classes)
    )


class Residual(nn.Module):
    def __init__(self, inputs, channels, stride):
        super().__init__()
        first, second = normed(inputs, channels, 3, stride), normed(channels, channels, 3)
        self.branch = nn.Sequential(*first, nn.ReLU(inplace=True), *second)
        same = inputs == channels and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*normed(inputs, channels, 1, stride))

    def forward(self, x):
        return F.relu(self.branch(x).add_(self.shortcut(x)), inplace=True)


def resnet18(classes):
    layers, inputs = [*normed(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)], 64
    for channels, stride in STAGES:
        layers += [Residual(inputs, channels, stride), Residual(channels, channels, 1)]
        inputs = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class Batches:
    """Batches of samples that lie on the device, in an order of chance; each is gathered into the same two tensors."""

    def __init__(self, asked, x, y):
        self.tables = [table.to(asked.device) for table in (x, y)]
        self.order = torch.randperm(asked.samples, device=asked.device).view(-1, asked.batch)
        self.given = [torch.empty_like(table[: asked.batch]) for table in self.tables]
        self.number = 0

    def take(self):
        rows = self.order[self.number]
        self.number = (self.number + 1) % len(self.order)
        for table, given in zip(self.tables, self.given):
            torch.index_select(table, 0, rows, out=given)


def model_and_samples(asked):
    if asked.work in GPT:
        sizes = GPT[asked.work]
        shape = (asked.samples, asked.context)
        x, y = (torch.randint(sizes["vocabulary"], shape) for _ in range(2))
        stored = torch.bfloat16 if asked.precision == "bf16" else torch.float32
        return Gpt(stored, asked.context, **sizes).to(asked.device), x, y
    shape, classes = CLASSIFIED[asked.work]
    model = {"mlp": mlp, "cnn": cnn, "audio_cnn": audio_cnn, "resnet18": resnet18}[asked.work](classes)
    x, y = torch.rand(asked.samples, *shape), torch.randint(classes, (asked.samples,))
    # Faster so on GPUs, and on CPUs too: the small CNN and that of sounds by a quarter, ResNet-18 by 5 to 10 %.
    model = model.to(memory_format=torch.channels_last)
    if len(shape) == 3:
        x = x.to(memory_format=torch.channels_last)
    return model.to(asked.device), x, y


def prefer_fast_attention(asked):
    """From now on, the forms of attention that PyTorch has on a GPU in the order of their speed there; older ones choose by themselves."""
    if asked.work not in GPT or asked.device != "cuda":
        return
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        names = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
        order = [getattr(SDPBackend, name) for name in names if hasattr(SDPBackend, name)]
        ATTENTION.enter_context(sdpa_kernel(order, set_priority=True))
    except (ImportError, TypeError):
        pass


def attention_of(asked):
    """The form of attention that PyTorch takes for this work, as its own choice tells; nothing where it does not."""
    if asked.work not in GPT:
        return ""
    try:
        from torch.nn.attention import SDPBackend

        sizes = GPT[asked.work]
        kind = torch.bfloat16 if asked.precision == "bf16" else torch.float32
        shape = (asked.batch, sizes["heads"], asked.context, sizes["width"] // sizes["heads"])
        given = torch.empty(shape, dtype=kind, device=asked.device, requires_grad=True)
        chosen = int(torch._fused_sdp_choice(given, given, given, is_causal=True))
        named = {int(backend): name for name, backend in SDPBackend.__members__.items()}
        return ", attention " + named.get(chosen, str(chosen)).lower().removesuffix("_attention")
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError):
        return ""


def optimizer(asked, parameters):
    # A step that is captured must find its count on the device.
    capturable = asked.form == "graphed"
    if asked.rule == "momentum":
        return torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=MOMENTUM, fused=True)
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True, capturable=capturable)


def whole_step(asked):
    """A batch, and forward, loss, backward, clip, update: the functions that do it, the parameters, the batch's inputs, the samples."""
    model, x, y = model_and_samples(asked)
    batches = Batches(asked, x, y)
    parameters = list(model.parameters())
    update = optimizer(asked, parameters)

    def loss_of(x, y):
        with torch.autocast(asked.device, torch.bfloat16, enabled=asked.precision == "bf16"):
            logits = model(x)
            return F.cross_entropy(logits.view(-1, logits.shape[-1]), y.view(-1))

    def clip():
        return nn.utils.clip_grad_norm_(parameters, MAX_NORM, foreach=True)

    if asked.form != "eager":
        loss_of, clip = torch.compile(loss_of), torch.compile(clip)

    def step():
        loss = loss_of(*batches.given)
        update.zero_grad(set_to_none=True)
        loss.backward()
        clip()
        update.step()
        return loss.detach()

    return batches.take, step, parameters, list(batches.given[0].shape), len(batches.tables[0])


def update_alone(asked):
    """Clip and update over given gradients."""
    sizes = common.pieces(asked.parameters)
    parameters = [nn.Parameter(torch.randn(n, device=asked.device)) for n in sizes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    update = optimizer(asked, parameters)

    def step():
        norm = nn.utils.clip_grad_norm_(parameters, MAX_NORM, foreach=True)
        update.step()
        return norm

    if asked.form != "eager":
        # The first step makes the optimizer's state, which the compiler should find there.
        step()
        step = torch.compile(step)
    return (lambda: None), step, parameters, [sum(sizes)], 0


class Captured:
    """`step` as one CUDA graph. It keeps `step`, and so the optimizer, whose state the graph goes on writing to."""

    def __init__(self, step):
        self.step = step
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(5):
                step()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outcome = step()

    def __call__(self):
        self.graph.replay()
        return self.outcome


def precision_of(asked, parameters):
    """What the tensors and switches say, not what was asked for."""
    if asked.precision == "bf16":
        return "bf16"
    if asked.device == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return str(parameters[0].dtype).replace("torch.float", "f")


def main():
    asked = common.arguments(["eager", "compiled", "graphed"])
    if asked.device == "cuda" and not torch.cuda.is_available():
        common.missing("this torch finds no CUDA device: install a torch built for the driver's CUDA")
    if asked.form == "graphed" and asked.device != "cuda":
        common.missing("CUDA graphs need a GPU")
    if asked.device == "cpu":
        torch.set_num_threads(asked.threads)
    torch.manual_seed(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = asked.precision == "tf32"
    torch.backends.cudnn.benchmark = True
    prefer_fast_attention(asked)
    take, step, parameters, inputs, samples = (update_alone if asked.work == "update" else whole_step)(asked)
    work = {
        "name": asked.work,
        "parameters": sum(p.numel() for p in parameters),
        "inputs": inputs,
        "samples": samples,
        "precision": precision_of(asked, parameters),
        "update": asked.update,
        "threads": torch.get_num_threads() if asked.device == "cpu" else 0,
    }
    if asked.form == "graphed":
        # A first batch, or the steps before the graph would read whatever the memory holds.
        take()
        step = Captured(step)
    outcome = None

    def once():
        nonlocal outcome
        take()
        outcome = step()

    def finite():
        return all(bool(torch.isfinite(values).all()) for values in [outcome, *parameters])

    wait = torch.cuda.synchronize if asked.device == "cuda" else None
    common.serve(f"PyTorch {asked.form}", torch.__version__ + attention_of(asked), work, once, finite, wait)


main()
