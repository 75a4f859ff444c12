"""Memory that was freed is used again."""

import os
import platform
import subprocess
import sys

import pytest

from tests import commands

PEEK = """
import os, resource, sys
import tensorflow as tf
from job.distributed.strategy import configure
from job.config import TrainConfig

def num_faults(keep_memory):
    configure(TrainConfig(keep_memory=keep_memory))
    work = tf.function(lambda x: tf.reduce_sum(tf.exp(x) * 2))
    x = tf.zeros(25_000_000)  # 100 MB, 24,000 pages
    float(work(x))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        float(work(x))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

# Each in a process of its own: TensorFlow chooses how it allocates once.
for keep_memory in (True, False):
    if os.fork() == 0:
        print(num_faults(keep_memory), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
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
        done = commands.run("tests.script", "-c", REUSE, method)
        assert done.returncode == 0, done.stderr
        faults[method] = int(done.stdout)
    assert faults["configured"] < 2000 < 20_000 < faults["plain"]


def test_kept_memory_is_used_again() -> None:
    # With oneDNN, which TensorFlow chooses by the CPU when it is imported, it keeps memory anyway.
    environment = os.environ | {"TF_ENABLE_ONEDNN_OPTS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PEEK], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    kept, returned = map(int, done.stdout.split())
    # Now and then the next call finds what the last one left.
    assert kept < 2000 < 50_000 < returned


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
    done = commands.run("tests.script", "-c", CHANGES)
    assert done.returncode == 0, done.stderr
    first, second, warning, environment = done.stdout.splitlines()
    assert (first, second, environment) == ("True", "False", "mine")
    assert "TensorFlow was made deterministic before in this process and stays so" in warning
