"""`job.train` that is stopped after so many steps, as by a signal that comes exactly then.

python -m tests.job.stopping NUM_STEPS --local ...
"""

import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from job import train


def main() -> int:
    """Runs the command and returns its exit code."""
    num_steps, arguments = int(sys.argv[1]), sys.argv[2:]
    from job.training.trainer import Trainer

    steps = Trainer.train_steps

    def stopping(self: Trainer, state: Any) -> Iterator[tuple[float, int]]:
        nonlocal num_steps
        for values in steps(self, state):
            num_steps -= 1
            if num_steps == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            yield values

    Trainer.train_steps = stopping  # type: ignore[method-assign]
    return train.main(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
