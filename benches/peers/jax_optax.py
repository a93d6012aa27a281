"""The works in JAX with optax: one jitted function a step, its buffers donated."""

import os

import common
from common import AUDIO_DROPOUT, AUDIO_STAGES, BETAS, CLASSIFIED, DECAY, GPT, MAX_NORM, MEL, MOMENTUM, STAGES

ASKED = common.arguments(["jitted"])
if ASKED.device == "cpu":
    # XLA takes as many threads as it finds cores, so it is given those cores alone.
    os.environ["JAX_PLATFORMS"] = "cpu"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: ASKED.threads])
else:
    # Else XLA takes most of the memory at once, where Warpstep's own work lies too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

try:
    import jax
    import jax.numpy as jnp
except ImportError:
    common.missing("jax is not installed: pip install jax optax")
try:
    import optax
except ImportError:
    common.missing("optax is not installed: pip install optax")

LEARNING_RATE = 1e-4


def threads():
    if ASKED.device != "cpu":
        return 0
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def half(value):
    """A product's operand: in bf16 where that is asked for."""
    return value.astype(jnp.bfloat16) if ASKED.precision == "bf16" else value


class Keys:
    """Keys of random numbers, one after the other."""

    def __init__(self):
        self.key = jax.random.key(1)

    def next(self):
        self.key, one = jax.random.split(self.key)
        return one

    def normal(self, *shape, scale=0.02):
        return scale * jax.random.normal(self.next(), shape, jnp.float32)


def linear(keys, inputs, outputs, bias=True):
    layer = {"weight": keys.normal(inputs, outputs)}
    return layer | ({"bias": jnp.zeros(outputs)} if bias else {})


def apply_linear(layer, x):
    out = half(x) @ half(layer["weight"])
    return out + half(layer["bias"]) if "bias" in layer else out


def mlp(keys, classes):
    sizes = [784, 256, 128, classes]
    parameters = [linear(keys, a, b) for a, b in zip(sizes, sizes[1:])]

    def forward(parameters, x):
        for layer in parameters[:-1]:
            x = jax.nn.relu(apply_linear(layer, x))
        return apply_linear(parameters[-1], x)

    return parameters, forward


def convolve(kernel, x, stride=1):
    """At the edges, zeros of half the kernel's side."""
    edge = (kernel.shape[0] // 2,) * 2
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(half(x), half(kernel), (stride, stride), (edge, edge), dimension_numbers=layout)


def pool(x, side, stride, edge=0):
    """The largest value of each window."""
    edges = [(0, 0), (edge, edge), (edge, edge), (0, 0)]
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, side, side, 1), (1, stride, stride, 1), edges)


def cnn(keys, classes):
    parameters, inputs = {"stages": [], "hidden": linear(keys, 64 * 49, 128), "out": linear(keys, 128, classes)}, 1
    for channels in (32, 64):
        parameters["stages"].append({"kernel": keys.normal(3, 3, inputs, channels, scale=0.1), "bias": jnp.zeros(channels)})
        inputs = channels

    def forward(parameters, x):
        x = x.transpose(0, 2, 3, 1)
        for stage in parameters["stages"]:
            x = pool(jax.nn.relu(convolve(stage["kernel"], x) + half(stage["bias"])), 2, 2)
        x = jax.nn.relu(apply_linear(parameters["hidden"], x.reshape(x.shape[0], -1)))
        return apply_linear(parameters["out"], x)

    return parameters, forward


class Norms:
    """Convolutions with a batch norm each, whose running means and variances a step makes anew beside the parameters."""

    def __init__(self, keys):
        self.keys, self.running = keys, []

    def declare(self, inputs, channels, kernel):
        self.running.append((jnp.zeros(channels), jnp.ones(channels)))
        scale = (2 / (kernel * kernel * channels)) ** 0.5
        weights = self.keys.normal(kernel, kernel, inputs, channels, scale=scale)
        return {"kernel": weights, "scale": jnp.ones(channels), "shift": jnp.zeros(channels)}

    @staticmethod
    def apply(running):
        """A function that applies a layer, each in the order in which they were declared, and what it finds of means and variances."""
        before, after = iter(running), []

        def apply(layer, x, stride=1):
            x = convolve(layer["kernel"], x, stride).astype(jnp.float32)
            mean, count = x.mean((0, 1, 2)), x.size // x.shape[-1]
            # In one pass, as Flax does by default.
            variance = jnp.square(x).mean((0, 1, 2)) - jnp.square(mean)
            found = (mean, variance * (count / (count - 1)))
            after.append(tuple(0.9 * old + 0.1 * new for old, new in zip(next(before), found)))
            return half((x - mean) * jax.lax.rsqrt(variance + 1e-5) * layer["scale"] + layer["shift"])

        return apply, after


def resnet18(keys, classes):
    norms = Norms(keys)

    def block(inputs, channels, stride):
        layers = {"first": norms.declare(inputs, channels, 3), "second": norms.declare(channels, channels, 3)}
        same = inputs == channels and stride == 1
        return layers if same else layers | {"shortcut": norms.declare(inputs, channels, 1)}

    parameters, inputs, strides = {"stem": norms.declare(3, 64, 7), "blocks": []}, 64, []
    for channels, stride in STAGES:
        parameters["blocks"] += [block(inputs, channels, stride), block(channels, channels, 1)]
        strides += [stride, 1]
        inputs = channels
    parameters["out"] = linear(keys, inputs, classes)

    def forward(parameters, running, x):
        normed, after = Norms.apply(running)
        x = normed(parameters["stem"], x.transpose(0, 2, 3, 1), 2)
        x = pool(jax.nn.relu(x), 3, 2, 1)
        for layers, stride in zip(parameters["blocks"], strides):
            branch = normed(layers["second"], jax.nn.relu(normed(layers["first"], x, stride)))
            x = jax.nn.relu(branch + (normed(layers["shortcut"], x, stride) if "shortcut" in layers else x))
        return apply_linear(parameters["out"], x.mean((1, 2))), after

    return parameters, norms.running, forward


def log_mel(x):
    """Log-mel pictures `[batch, bands, frames, 1]` of waveforms."""
    window, edge = MEL["window"], MEL["window"] // 2
    padded = jnp.pad(x, [(0, 0), (edge, edge)], mode="reflect")
    first = jnp.arange(0, x.shape[1] + 1, MEL["hop"])
    frames = padded[:, first[:, None] + jnp.arange(window)] * (0.5 - 0.5 * jnp.cos(2 * jnp.pi * jnp.arange(window) / window))
    spectrum = jnp.fft.rfft(frames)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    picture = jnp.log(power @ jnp.array(common.triangles()).T + MEL["floor"]) * MEL["scale"] + MEL["shift"]
    return picture.transpose(0, 2, 1)[..., None]


def audio_cnn(keys, classes):
    norms, inputs = Norms(keys), 1
    parameters = {"stages": []}
    for channels in AUDIO_STAGES:
        parameters["stages"].append(norms.declare(inputs, channels, 3))
        inputs = channels
    parameters["out"] = linear(keys, inputs * (MEL["bands"] // 2 ** len(AUDIO_STAGES)), classes)

    def forward(parameters, kept, x):
        running, key = kept
        normed, after = Norms.apply(running)
        x = log_mel(x)
        for layer in parameters["stages"]:
            x = pool(jax.nn.relu(normed(layer, x)), 2, 2)
        x = x.mean(2).reshape(x.shape[0], -1)
        key, own = jax.random.split(key)
        stays = jax.random.bernoulli(own, 1 - AUDIO_DROPOUT, x.shape)
        x = jnp.where(stays, x / (1 - AUDIO_DROPOUT), 0)
        return apply_linear(parameters["out"], x), (after, key)

    return parameters, (norms.running, keys.next()), forward


def gpt(keys, context, vocabulary, layers, heads, width, bias):
    def norm():
        return {"scale": jnp.ones(width)} | ({"shift": jnp.zeros(width)} if bias else {})

    def block():
        parts = {"packed": (width, 3 * width), "projection": (width, width)}
        parts |= {"up": (width, 4 * width), "down": (4 * width, width)}
        return {name: linear(keys, *sizes, bias) for name, sizes in parts.items()} | {"norm_1": norm(), "norm_2": norm()}

    parameters = {
        "tokens": keys.normal(vocabulary, width),
        "positions": keys.normal(context, width),
        "blocks": [block() for _ in range(layers)],
        "norm": norm(),
    }

    def normed(layer, x):
        x = x.astype(jnp.float32)
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        out = (x - mean) * jax.lax.rsqrt(variance + 1e-5) * layer["scale"]
        return out + layer["shift"] if "shift" in layer else out

    def forward(parameters, x):
        # Once to bf16 where that is asked for: so the sums along all blocks are stored in 16 bits, as on the other side.
        hidden = half(parameters["tokens"][x] + parameters["positions"][: x.shape[1]])
        for layer in parameters["blocks"]:
            packed = apply_linear(layer["packed"], normed(layer["norm_1"], hidden))
            heads_of = [p.reshape(*p.shape[:2], heads, -1) for p in jnp.split(packed, 3, axis=-1)]
            implementation = "cudnn" if ASKED.device == "cuda" and ASKED.precision == "bf16" else "xla"
            mixed = jax.nn.dot_product_attention(*heads_of, is_causal=True, implementation=implementation)
            hidden = hidden + apply_linear(layer["projection"], mixed.reshape(hidden.shape))
            up = jax.nn.gelu(apply_linear(layer["up"], normed(layer["norm_2"], hidden)), approximate=True)
            hidden = hidden + apply_linear(layer["down"], up)
        return half(normed(parameters["norm"], hidden)) @ half(parameters["tokens"]).T

    return parameters, forward


def optimizer():
    clip = optax.clip_by_global_norm(MAX_NORM)
    if ASKED.rule == "momentum":
        return optax.chain(clip, optax.sgd(LEARNING_RATE, momentum=MOMENTUM))
    matrices = lambda parameters: jax.tree.map(lambda p: p.ndim >= 2, parameters)
    return optax.chain(clip, optax.adamw(LEARNING_RATE, *BETAS, weight_decay=DECAY, mask=matrices))


def keeping_nothing(parameters, forward):
    """A model that keeps nothing from step to step but its parameters."""
    return parameters, (), lambda parameters, kept, x: (forward(parameters, x), kept)


def model_and_samples(keys):
    if ASKED.work in GPT:
        sizes = GPT[ASKED.work]
        shape = (ASKED.samples, ASKED.context)
        x, y = (jax.random.randint(keys.next(), shape, 0, sizes["vocabulary"]) for _ in range(2))
        return *keeping_nothing(*gpt(keys, ASKED.context, **sizes)), x, y
    shape, classes = CLASSIFIED[ASKED.work]
    x = jax.random.uniform(keys.next(), (ASKED.samples, *shape))
    y = jax.random.randint(keys.next(), (ASKED.samples,), 0, classes)
    if ASKED.work in ("audio_cnn", "resnet18"):
        return *(audio_cnn if ASKED.work == "audio_cnn" else resnet18)(keys, classes), x, y
    return *keeping_nothing(*(mlp if ASKED.work == "mlp" else cnn)(keys, classes)), x, y


def whole_step(keys):
    """A batch, forward, loss, backward, clip, update: the step, its state, what it is given each time, the batch's inputs."""
    parameters, kept, forward, x, y = model_and_samples(keys)
    order = jax.random.permutation(keys.next(), ASKED.samples).reshape(-1, ASKED.batch)
    update = optimizer()

    def step(state, x, y, order):
        parameters, slots, kept, number = state
        rows = order[number]
        x, y = x[rows], y[rows]

        def loss_of(parameters):
            logits, after = forward(parameters, kept, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), y).mean(), after

        (loss, kept), gradients = jax.value_and_grad(loss_of, has_aux=True)(parameters)
        changes, slots = update.update(gradients, slots, parameters)
        return (optax.apply_updates(parameters, changes), slots, kept, (number + 1) % len(order)), loss

    state = (parameters, update.init(parameters), kept, jnp.zeros((), jnp.int32))
    return step, state, (x, y, order), [order.shape[1], *x.shape[1:]]


def update_alone(keys):
    """Clip and update over given gradients."""
    sizes = common.pieces(ASKED.parameters)
    parameters, gradients = ([keys.normal(n, scale=1.0) for n in sizes] for _ in range(2))
    update = optimizer()

    def step(state, gradients):
        parameters, slots = state
        changes, slots = update.update(gradients, slots, parameters)
        return (optax.apply_updates(parameters, changes), slots), optax.global_norm(gradients)

    return step, (parameters, update.init(parameters)), (gradients,), [sum(sizes)]


def precision_of(parameters):
    """What the arrays and switches say, not what was asked for."""
    if ASKED.work != "update" and ASKED.precision == "bf16":
        return "bf16"
    if ASKED.device == "cuda" and jax.config.jax_default_matmul_precision != "highest":
        return "tf32"
    return str(parameters[0].dtype).replace("float", "f")


def main():
    if ASKED.device == "cuda":
        try:
            jax.devices("cuda")
        except RuntimeError:
            common.missing("this jax finds no CUDA device: pip install 'jax[cuda13]'")
        # By default XLA takes tf32 for products in f32 where the device has it. "tensorfloat32" means one degree above the default:
        # tf32 too, but without XLA's own kernels by Triton, which take it at the default alone.
        if ASKED.precision != "bf16":
            jax.config.update("jax_default_matmul_precision", "default" if ASKED.precision == "tf32" else "highest")
    step, state, given, inputs = (update_alone if ASKED.work == "update" else whole_step)(Keys())
    parameters = jax.tree.leaves(state[0])
    work = {
        "name": ASKED.work,
        "parameters": sum(parameter.size for parameter in parameters),
        "inputs": inputs,
        "samples": 0 if ASKED.work == "update" else given[0].shape[0],
        "precision": precision_of(parameters),
        "update": ASKED.update,
        "threads": threads(),
    }
    jitted = jax.jit(step, donate_argnums=0)
    queued = [(state, None)]

    def once():
        queued[0] = jitted(queued[0][0], *given)

    def wait():
        jax.block_until_ready(queued[0])

    def finite():
        (parameters, *_), loss = queued[0]
        return all(bool(jnp.isfinite(values).all()) for values in [loss, *jax.tree.leaves(parameters)])

    common.serve("JAX", f"{jax.__version__}, optax {optax.__version__}", work, once, finite, wait)


main()
