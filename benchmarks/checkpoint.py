"""Measures how long training waits for a checkpoint, and how much slower steps are meanwhile.

    python benchmarks/checkpoint.py [--output FOLDER_OR_GS_URL]

Trains the INbreast network of the reference implementation (TensorFlow-FlexUNet; 1.5 GB of weights
and moments) on phantoms, and saves a checkpoint at regular steps. Training waits for it twice: in
`Trainer.save`, and in the update of the next step, which copies the values that it changes
(measured as that step minus the median of the other steps during an upload). The upload continues
during the following steps.
"""

import statistics
import tempfile
import threading
import time
from typing import Any

import click
from machine import describe_machine, write_result

from data_prep.config import PrepConfig
from data_prep.phantoms.images import write_phantoms
from data_prep.pipeline import prepare
from data_prep.sources.pairs import find_sources
from job.config import ModelConfig, TrainConfig, identity_of
from job.data.dataset import open_dataset
from job.distributed.process_group import ProcessGroup
from job.runs.run import Run

_STEPS = 100  # steps per save for the share of time; the measurement needs fewer


@click.command()
@click.option("--image-size", default=256, show_default=True, help="Side of the images, pixels.")
@click.option("--batch-size", default=2, show_default=True, help="Images per step.")
@click.option("--steps-per-save", default=40, show_default=True, help="Steps between two saves.")
@click.option("--saves", default=3, show_default=True, help="Checkpoints to save.")
@click.option("--num-layers", default=8, show_default=True, help="Levels of FlexUNet.")
@click.option("--output", help="Folder or gs:// URL of the run; none: a temporary folder.")
def main(
    image_size: int, batch_size: int, steps_per_save: int, saves: int, num_layers: int,
    output: str | None,
) -> None:  # fmt: skip
    """Measure how long training waits for checkpoints of the INbreast network."""
    from job.distributed.strategy import configure

    with tempfile.TemporaryDirectory(prefix="flexunet-bench-") as folder:
        write_phantoms(f"{folder}/source", 20, image_size, 1)
        options = PrepConfig(image_size=image_size, fractions=(0.7, 0.2, 0.1), num_processes=1)
        prepare(find_sources(f"{folder}/source"), f"{folder}/data", options, progress=False)
        config = TrainConfig(
            data=f"{folder}/data",
            output=output or f"{folder}/runs",
            name="checkpoint-benchmark",
            epochs=10**6,
            global_batch_size=batch_size,
            precision="float32",
            model=ModelConfig(num_layers=num_layers),
            prediction_images=0,
            tensorboard=False,
            keep_checkpoints=1,
        )
        strategy = configure(config)
        with Run.open(config.output, str(config.name)) as run:
            result = _measure(config, run, strategy, steps_per_save, saves)
    result = {"machine": describe_machine(), "image_size": image_size} | result
    write_result(f"checkpoint-{'gs' if output and '://' in output else 'local'}", result)
    waits, share = result["wait_s"], result["share_of_time"]
    print(
        f"training waits {statistics.median(waits):.2f} s ({min(waits):.2f}-{max(waits):.2f}) per "
        f"save, {100 * share:.2f} % of the time with one save per {_STEPS} steps\n"
        f"upload: {statistics.median(result['stored_s']):.1f} s; steps meanwhile take "
        f"{result['slowdown']:.2f} times as long ({result['busy_step_s']:.2f} s instead of "
        f"{result['idle_step_s']:.2f} s)"
    )


def _measure(
    config: TrainConfig, run: Run, strategy: Any, steps_per_save: int, saves: int
) -> dict[str, Any]:
    from job.training.setup import TrainingSetup
    from job.training.state import TrainState
    from job.training.trainer_factory import open_trainer

    dataset = open_dataset(str(config.data))
    run.check_identity(identity_of(config), dataset.digest)
    waits: list[float] = []
    stored: list[float] = []
    first: list[float] = []
    idle: list[float] = []
    busy: list[float] = []
    with open_trainer(
        TrainingSetup(config, dataset, run, strategy, ProcessGroup(strategy))
    ) as trainer:
        assert trainer.run_writer is not None
        upload_queue = trainer.run_writer.upload_queue
        state = trainer.restore()
        saved_at: float | None = None
        has_landed = threading.Event()
        num_steps = 0
        upload_queue.flush()
        while len(stored) < saves:
            last = None
            # An epoch is short here; only its steps are measured.
            for _ in trainer.train_steps(state):
                now = time.perf_counter()
                was_busy = saved_at is not None
                is_first = len(waits) > len(first)
                if saved_at is not None and has_landed.is_set():
                    stored.append(now - saved_at)
                    saved_at = None
                if last is not None and num_steps > 1:
                    (first if is_first else busy if was_busy else idle).append(now - last)
                num_steps += 1
                if num_steps % steps_per_save == 0 and len(waits) < saves:
                    begin = time.perf_counter()
                    trainer.save(state)
                    waits.append(time.perf_counter() - begin)
                    saved_at, has_landed = begin, threading.Event()
                    upload_queue.post(has_landed.set)  # runs after all uploads of the save
                last = time.perf_counter()
            state = TrainState(state.learning_rate, epoch=state.epoch + 1, step=state.step)
        upload_queue.flush()
    # If a checkpoint was stored within one step, only that step ran during the upload.
    step_s, busy_step_s = statistics.median(idle), statistics.median(busy or first)
    # One pair per save; a step that was not slower than the others had no copying time.
    totals = [a + max(0.0, b - busy_step_s) for a, b in zip(waits, first, strict=True)]
    return {
        "steps_per_save": steps_per_save,
        "wait_s": totals,
        "save_call_s": waits,
        "first_step_s": first,
        "stored_s": stored,
        "idle_step_s": step_s,
        "busy_step_s": busy_step_s,
        "slowdown": busy_step_s / step_s,
        "num_idle_steps": len(idle),
        "num_busy_steps": len(busy),
        "share_of_time": statistics.median(totals) / (_STEPS * step_s),
    }


if __name__ == "__main__":
    main()
