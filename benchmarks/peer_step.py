"""Compares the training step with the same network in PyTorch, eager and compiled.

    make bench-peers        # creates .venv-peers and runs this script in it
    python benchmarks/peer_step.py [--image-size 512] [--batch-size 2] [--precisions float32]

The network is FlexUNet with the defaults of this project: 125 million parameters, kernels of 9 to 3
pixels, dropout. In PyTorch its tensors are in the format `channels_last`, `Adam` is fused, the
gradients are clipped as here, and bfloat16 is that of `torch.autocast`. `torch.compile` compiles
the network and the loss. The script first checks that a small network of both frameworks with the
same weights gives the same logits and loss.

Each framework has its own process, since one with both may abort. A step of ours and a step of
PyTorch run in turns, so a machine that is busy for a while slows both. Only two processes run at a
time, because each needs several gigabytes. The CPU times are those of all threads.
"""

import contextlib
import importlib.util
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import numpy as np
from machine import connected_process, describe_machine, shown, spread, write_result

from job.config import ModelConfig, OptimizerConfig, TrainConfig

OURS = "flexunet"
PEERS = {"eager": False, "compiled": True}  # whether `torch.compile` compiles it
SMALL = ModelConfig(num_layers=3, base_filters=4, base_kernels=(5, 5), dilation=(2, 2))
SMALL_SIZE = 32  # pixels
NUM_CLASSES = 2

# `step(number)` returns the loss.
Step = Callable[[int], float]


@click.command()
@click.option("--image-size", default=512, show_default=True, help="Side of the images, pixels.")
@click.option("--batch-size", default=2, show_default=True, help="Images per step.")
@click.option("--num-layers", default=8, show_default=True, help="Levels of FlexUNet.")
@click.option("--repeats", default=5, show_default=True, help="Steps of each, in turns.")
@click.option("--peers", default=",".join(PEERS), show_default=True, help="Steps of PyTorch.")
@click.option(
    "--precisions", default="float32,mixed_bfloat16", show_default=True, help="Of the step."
)
def main(
    image_size: int, batch_size: int, num_layers: int, repeats: int, peers: str, precisions: str
) -> None:
    """Compare the training step with PyTorch's, and write `results/peer-step-SIZE.json`."""
    if importlib.util.find_spec("torch") is None:
        print("PyTorch is not installed; see make bench-peers; nothing measured")
        return
    with tempfile.TemporaryDirectory() as work:
        difference = check_same_network(Path(work) / "small.npz")
    print(f"{image_size} x {image_size}, batch {batch_size}; median (least-most)")
    rows = {}
    for precision in precisions.split(","):
        for peer in peers.split(","):
            settings = (image_size, batch_size, num_layers, precision)
            rows[f"{precision}, {peer}"] = row = compare(settings, PEERS[peer], repeats)
            print(f"{precision}, PyTorch {peer}: {row['shown']}", flush=True)
    result = {
        "machine": describe_machine(),
        "torch": version("torch"),
        "image_size": image_size,
        "batch_size": batch_size,
        "num_layers": num_layers,
        "largest_difference_of_small_networks": difference,
        "comparisons": rows,
    }
    write_result(f"peer-step-{image_size}", result)


def compare(settings: tuple[int, int, int, str], is_compiled: bool, repeats: int) -> dict[str, Any]:
    """Returns times and ratios of steps in turns; the first of each is not counted."""
    times: dict[str, list[tuple[float, float]]] = {"ours": [], "peer": []}
    with (
        connected_process(serve, our_step, settings) as ours,
        connected_process(serve, compiled_step if is_compiled else eager_step, settings) as peer,
    ):
        sides = {"ours": ours, "peer": peer}
        for side in sides.values():
            for _ in range(2):
                ask(side, "step")
        for _ in range(repeats):
            for name, side in sides.items():
                times[name].append(ask(side, "step"))
        peaks = {name: ask(side, "peak") for name, side in sides.items()}
        parameters = {name: ask(side, "parameters") for name, side in sides.items()}
    assert parameters["ours"] == parameters["peer"], parameters
    (wall, cpu), peer_times = (np.array(times[name]).T for name in ("ours", "peer"))
    ratios = peer_times[0] / wall
    steps = f"ours {shown(wall.tolist())} s, PyTorch {shown(peer_times[0].tolist())} s"
    return {
        "parameters": parameters["ours"],
        "step_s": {"ours": spread(wall.tolist()), "peer": spread(peer_times[0].tolist())},
        "cpu_s": {"ours": spread(cpu.tolist()), "peer": spread(peer_times[1].tolist())},
        "peak_rss_mb": peaks,
        "rate_ratio": spread(ratios.tolist()),
        "cpu_ratio": spread((peer_times[1] / cpu).tolist()),
        "shown": f"{steps}; images/s, ours / it: {shown(ratios.tolist())}",
    }


def check_same_network(path: Path) -> float:
    """Returns the largest difference of logits and loss between both frameworks.

    Args:
        path: of a file to write weights and results of ours to.
    """
    context = multiprocessing.get_context("spawn")
    for work in (write_small, compare_small):
        process = context.Process(target=work, args=(path,))
        process.start()
        process.join()
        assert process.exitcode == 0, f"{work.__name__} failed"
    difference = float(np.load(path)["difference"])
    assert difference < 1e-5, f"other results than ours: {difference}"
    return difference


def write_small(path: Path) -> None:
    """Writes weights, input, logits and loss of a small network of ours."""
    from job.distributed.runtime import import_tensorflow
    from job.losses import make_loss
    from job.models.registry import build_model

    tf = import_tensorflow()
    shape = (SMALL_SIZE, SMALL_SIZE, 3)
    model = build_model(SMALL, image_shape=shape, num_classes=NUM_CLASSES)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (2, *shape)).astype(np.uint8)
    masks = random.integers(0, NUM_CLASSES, images.shape[:3]).astype(np.uint8)
    logits = model(images)
    loss = make_loss("categorical_crossentropy", num_classes=NUM_CLASSES)
    value = loss(tf.constant(masks, tf.int32), logits, tf.ones(2), tf.identity)
    weights = {f"weight{at:03}": each.numpy() for at, each in enumerate(model.trainable_weights)}
    np.savez(path, images=images, masks=masks, logits=logits, loss=value, **weights)


def compare_small(path: Path) -> None:
    """Computes the same in PyTorch; adds the largest difference to the file."""
    import torch

    found = dict(np.load(path))
    network = torch_network(SMALL).eval()
    weights = [torch.tensor(found[name]) for name in sorted(found) if name.startswith("weight")]
    with torch.no_grad():
        for parameter, weight in zip(network.parameters(), weights, strict=True):
            # Convolutions of TensorFlow: (H, W, in, out); transposed ones: (H, W, out, in).
            parameter.copy_(weight.permute(3, 2, 0, 1) if weight.ndim == 4 else weight)
        logits = network(torch.tensor(found["images"]))
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(found["masks"]).long())
    differences = [
        np.abs(logits.permute(0, 2, 3, 1).numpy() - found["logits"]).max(),
        abs(float(loss) - float(found["loss"])),
    ]
    np.savez(path, **found, difference=max(differences))


def ask(side: Connection, what: str) -> Any:
    """Returns wall and CPU seconds ("step"), the peak memory in MB, or the parameters."""
    side.send(what)
    return side.recv()


def serve(make: Callable[..., Any], settings: tuple[Any, ...], connection: Connection) -> None:
    """Answers `ask` until the connection is closed."""
    num_parameters, step = make(*settings)
    count = 0
    with contextlib.suppress(EOFError):
        while True:
            what = connection.recv()
            if what == "parameters":
                connection.send(num_parameters)
            elif what == "peak":
                peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                connection.send(peak_kib * 1024 / 1e6)
            else:
                connection.send(timed(step, count))
                count += 1


def timed(step: Step, count: int) -> tuple[float, float]:
    """Returns wall and CPU seconds of a step."""
    before, started = time.process_time(), time.perf_counter()
    step(count)
    return time.perf_counter() - started, time.process_time() - before


def our_step(image_size: int, batch_size: int, num_layers: int, precision: str) -> tuple[int, Step]:
    """Returns the number of parameters and the step of this project."""
    from step import Network

    config = TrainConfig(global_batch_size=batch_size)
    network = Network(image_size, precision, num_layers, config)
    network.configure()
    model, step = network.our_step()
    return model.count_params(), step


def eager_step(*settings: Any) -> tuple[int, Step]:
    """Returns the number of parameters and the step of PyTorch."""
    return torch_step(*settings, is_compiled=False)


def compiled_step(*settings: Any) -> tuple[int, Step]:
    """Returns the number of parameters and the step of PyTorch with `torch.compile`."""
    return torch_step(*settings, is_compiled=True)


def torch_step(
    image_size: int, batch_size: int, num_layers: int, precision: str, *, is_compiled: bool
) -> tuple[int, Step]:
    """Returns the number of parameters and the step of PyTorch."""
    import torch

    options = OptimizerConfig()
    network = torch_network(ModelConfig(num_layers=num_layers))
    network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(
        network.parameters(), options.learning_rate, eps=options.epsilon, fused=True
    )
    shape = (batch_size, image_size, image_size)
    images, masks = torch.zeros((*shape, 3), dtype=torch.uint8), torch.zeros(shape).long()
    is_narrow = precision == "mixed_bfloat16"

    def loss_of(images: Any, masks: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_narrow):
            logits = network(images)
        return torch.nn.functional.cross_entropy(logits, masks)

    loss_of = torch.compile(loss_of) if is_compiled else loss_of

    def step(count: int) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(images, masks)
        loss.backward()
        torch.nn.utils.clip_grad_value_(network.parameters(), options.clipvalue)
        optimizer.step()
        return float(loss.item())

    return sum(each.numel() for each in network.parameters()), step


def torch_network(config: ModelConfig) -> Any:
    """Returns FlexUNet in PyTorch: (B, H, W, 3) uint8 -> logits, (B, K, H, W) float32."""
    import torch
    from torch import nn

    def widths(level: int) -> int:
        return config.base_filters * 2**level

    def block(channels: int, level: int) -> Any:
        kernel = max(config.base_kernels[0] - 2 * level, 3)
        dilation = max(config.dilation[0] - level, 1)
        options = {"padding": "same", "dilation": dilation}
        return nn.Sequential(
            nn.Conv2d(channels, widths(level), kernel, **options),
            nn.ReLU(),
            nn.Dropout(config.dropout_rate * level),
            nn.Conv2d(widths(level), widths(level), kernel, **options),
            nn.ReLU(),
        )

    class FlexUNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            last = config.num_layers - 1
            sides = [3, *(widths(level) for level in range(last))]
            self.down = nn.ModuleList(block(each, level) for level, each in enumerate(sides))
            self.up = nn.ModuleList()  # in turns: transposed convolution, block
            for level in reversed(range(last)):
                self.up.append(nn.ConvTranspose2d(widths(level + 1), widths(level), 2, stride=2))
                self.up.append(block(2 * widths(level), level))
            self.head = nn.Conv2d(widths(0), NUM_CLASSES, 1)

        def forward(self, images: Any) -> Any:
            # A view of (B, H, W, C) is in the format `channels_last` already.
            x = images.permute(0, 3, 1, 2).float() / 255
            skips = []
            for level, down in enumerate(self.down):
                x = down(x if level == 0 else nn.functional.max_pool2d(x, 2))
                skips.append(x)
            skips.pop()
            for transposed, convolutions in zip(self.up[::2], self.up[1::2], strict=True):
                x = convolutions(torch.cat([transposed(x), skips.pop()], dim=1))
            with torch.autocast("cpu", enabled=False):
                return self.head(x.float())

    return FlexUNet()


if __name__ == "__main__":
    main()
