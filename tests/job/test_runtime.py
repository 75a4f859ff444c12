"""Memory that was freed is used again."""

import os
import platform
import subprocess
import sys

import pytest

PEEK = """
import resource, sys
from job.distributed.runtime import import_tensorflow
from job.distributed.strategy import configure
from job.config import TrainConfig

tf = import_tensorflow()
configure(TrainConfig(keep_memory=sys.argv[1] == "kept"))
work = tf.function(lambda x: tf.reduce_sum(tf.exp(x) * 2))
x = tf.zeros(25_000_000)  # 100 MB, 24,000 pages
float(work(x))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    float(work(x))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


REUSE = """
import ctypes, resource, sys
from job.distributed.runtime import import_tensorflow
from job.distributed.strategy import configure
from job.config import TrainConfig

if sys.argv[1] == "configured":
    configure(TrainConfig())
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
size = 100_000_000  # 24,000 pages

def work():
    piece = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
    ctypes.memset(piece, 1, size)
    libc.free(piece)

work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is a setting of glibc")
def test_freed_memory_is_used_again() -> None:
    faults = {}
    for method in ("configured", "plain"):
        done = subprocess.run(
            [sys.executable, "-c", REUSE, method], capture_output=True, text=True, check=True
        )
        faults[method] = int(done.stdout)
    assert faults["configured"] < 2000 < 20_000 < faults["plain"]


def test_kept_memory_is_used_again() -> None:
    faults = {}
    for method in ("kept", "returned"):
        # In a process of its own: TensorFlow reads it once. With oneDNN, which it chooses by the
        # CPU, it keeps memory anyway.
        done = subprocess.run(
            [sys.executable, "-c", PEEK, method],
            env=os.environ | {"TF_ENABLE_ONEDNN_OPTS": "0"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        faults[method] = int(done.stdout)
    # Now and then the next call finds what the last one left.
    assert faults["kept"] < 2000 < 50_000 < faults["returned"]


CHANGES = """
import logging, os, sys
from job.distributed.strategy import configure
from job.config import TrainConfig

logging.basicConfig(stream=sys.stdout, format="%(message)s")
os.environ["TF_CONFIG"] = "mine"
for value in (True, False):
    print(value)
    configure(TrainConfig(deterministic=value))
print(os.environ["TF_CONFIG"])
"""


def test_a_later_run_is_warned_of_determinism_and_the_environment_stays() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHANGES], capture_output=True, text=True, check=True
    )
    first, second, warning, environment = done.stdout.splitlines()
    assert (first, second, environment) == ("True", "False", "mine")
    assert "TensorFlow was made deterministic before in this process and stays so" in warning
