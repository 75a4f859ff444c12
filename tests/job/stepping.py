"""`job.train` whose clock counts the steps of the run in seconds, and that may kill itself.

python -m tests.job.stepping NUM_STEPS --local ...

NUM_STEPS: steps after which it gets a SIGKILL; 0: none.
"""

import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from job import train


def main() -> int:
    """Runs the command and returns its exit code."""
    last, arguments, done = int(sys.argv[1]), sys.argv[2:], 0
    from job.optimization.time_schedule import TrainingClock
    from job.training import trainer

    steps = trainer.Trainer.train_steps

    def counting(self: trainer.Trainer, state: Any) -> Iterator[tuple[float, int]]:
        nonlocal done
        for values in steps(self, state):
            done += 1
            if done == last:
                os.kill(os.getpid(), signal.SIGKILL)
            yield values

    def clock(before_s: float) -> TrainingClock:
        return TrainingClock(before_s, lambda: float(done))

    trainer.Trainer.train_steps = counting  # type: ignore[method-assign]
    trainer.TrainingClock = clock  # type: ignore[misc, assignment]
    return train.main(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
