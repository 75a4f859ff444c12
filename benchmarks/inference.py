"""Compares the FLOP rate of prediction with the machine's matrix-multiplication rate.

    python benchmarks/inference.py [--image-size 512] [--batch-size 8]

step: the compiled step that `infer` runs on a batch, in turns with a multiplication of matrices.
path: all of `infer` for an image: read, decode, fit, predict, argmax, encode, write; its images/s
divided by those of the step. The network is the INbreast network with untrained weights, which take
the same time as trained ones.
"""

import tempfile
import time
from pathlib import Path

import click
from machine import describe_machine, shown, write_result
from step import MATMUL_SIZE, convolution_flops, matmul_flops_per_s

from data_prep.config import PrepConfig
from data_prep.phantoms.images import write_phantoms
from data_prep.pipeline import prepare
from data_prep.shards.manifest import MANIFEST_NAME, parse_manifest
from data_prep.sources.pairs import find_sources
from flexunet.storage import open_store
from job.config import ModelConfig, TrainConfig
from job.postprocessing.masks import Postprocessing


@click.command()
@click.option("--image-size", default=512, show_default=True, help="Side of the images, pixels.")
@click.option("--batch-size", default=8, show_default=True, help="Images at once.")
@click.option("--num-images", default=24, show_default=True, help="Images of a pass of `path`.")
@click.option("--repeats", default=5, show_default=True, help="Turns, after one warm-up turn.")
@click.option("--num-layers", default=8, show_default=True, help="Levels of FlexUNet.")
@click.option("--matmul-size", default=MATMUL_SIZE, show_default=True, help="Side of matrices.")
def main(
    image_size: int, batch_size: int, num_images: int, repeats: int, num_layers: int,
    matmul_size: int,
) -> None:  # fmt: skip
    """Measure prediction with the INbreast network of the reference implementation."""
    from job.distributed.runtime import import_tensorflow
    from job.distributed.strategy import configure

    tf = import_tensorflow()
    configure(TrainConfig(global_batch_size=batch_size))
    from job.inference.chunk import Chunk, predict_images
    from job.inference.inputs import find_images
    from job.inference.options import InferConfig
    from job.inference.prediction import Predictor
    from job.models.ensemble import make_probability_step, network_of
    from job.runs.loading import model_for

    with tempfile.TemporaryDirectory(prefix="flexunet-bench-") as folder:
        write_phantoms(f"{folder}/source", num_images, image_size, 1)
        options = PrepConfig(image_size=image_size, num_processes=1)
        prepare(find_sources(f"{folder}/source"), f"{folder}/data", options, progress=False)
        text = Path(f"{folder}/data/{MANIFEST_NAME}").read_bytes()
        manifest = parse_manifest(text, MANIFEST_NAME)
        config = TrainConfig(
            precision="float32", model=ModelConfig(num_layers=num_layers, image_channels=3)
        )
        model = model_for(config, manifest)
        predictor = Predictor(make_probability_step(network_of([model])), manifest)
        images = f"{folder}/source/images"
        names = find_images(open_store(images))
        flops = convolution_flops(model) * batch_size
        batch = tf.zeros((batch_size, image_size, image_size, manifest.channels), tf.uint8)
        step_s, rates, path_s = [], [], []
        for count in range(1 + repeats):
            started = time.perf_counter()
            predictor.step(batch).numpy()
            step_s.append(time.perf_counter() - started)
            # The best of three: the first one is often slower, because of the caches.
            rates.append(max(matmul_flops_per_s(tf, tf.float32, matmul_size) for _ in range(3)))
            chunk = Chunk(
                (), images, f"{folder}/masks-{count}",
                InferConfig(batch_size=batch_size, progress=False), tuple(names),
                Postprocessing(), None,
            )  # fmt: skip
            started = time.perf_counter()
            predict_images(chunk, predictor, lambda: None)
            path_s.append(time.perf_counter() - started)
    step_s, rates, path_s = step_s[1:], rates[1:], path_s[1:]
    share = [flops / t / rate for t, rate in zip(step_s, rates, strict=True)]
    path = [
        num_images / whole / (batch_size / one) for whole, one in zip(path_s, step_s, strict=True)
    ]
    write_result(
        f"inference-{image_size}",
        {
            "machine": describe_machine(),
            "image_size": image_size,
            "batch_size": batch_size,
            "step_s": step_s,
            "matmul_gflop_per_s": [rate / 1e9 for rate in rates],
            "share_of_matmul_rate": share,
            "num_images": num_images,
            "path_s": path_s,
            "path_over_step": path,
        },
    )
    print(f"step: {shown(step_s)} s, {shown(share)} of the matmul rate")
    print(f"path: {shown([num_images / t for t in path_s])} images/s, {shown(path)} of the step's")


if __name__ == "__main__":
    main()
