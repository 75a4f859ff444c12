"""Which operations of a compiled function a GPU could not run, from TensorFlow's list of kernels.

TensorFlow lists the kernels that it was built with, those for GPUs too where there is none. An
operation without one is silently placed on the CPU, and its inputs and outputs are copied there
and back in every step.
"""

import functools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import kernels

Types = tuple[tuple[str, tuple[str, ...]], ...]  # (attribute, names of its types)

PROJECT = Path(__file__).resolve().parents[2]

# A kernel for DEFAULT serves every device; on a GPU such kernels keep whole numbers of 32 bits in
# the memory of the host, as do most of those for GPUs, so that shapes and indices cost no copy.
ON_GPU = frozenset({"GPU", "DEFAULT"})
BY_XLA = frozenset({"XLA_GPU_JIT"})


@dataclass(frozen=True)
class Missing:
    """An operation that has no kernel for a GPU.

    Attributes:
        types: of its inputs and outputs, or other types that choose a kernel, by attribute.
        function: the compiled function, or the one inside it, that holds it.
        source: line of this project that made it.
    """

    op: str
    types: Types
    function: str
    source: str

    def __str__(self) -> str:
        types = ", ".join(f"{name}={'|'.join(values)}" for name, values in self.types)
        return f"{self.op}({types}) in {self.function}, made by {self.source}"


def missing_kernels(function: Any, *, may_miss: Collection[str] = ()) -> set[Missing]:
    """Returns the operations of a concrete function that have no kernel for a GPU.

    Args:
        function: as `tf.function` returns it from `get_concrete_function`.
        may_miss: names of operations that may run on the host.
    """
    return {
        Missing(op.type, _types(op), graph.name, _source(op))
        for graph, is_by_xla in _graphs(function.graph, is_by_xla=False)
        for op in graph.get_operations()
        # Of a called function, one stands for each argument, which is no operation there.
        if op.type not in {"Placeholder", *may_miss}
        and not _has_kernel(op.type, _types(op), BY_XLA if is_by_xla else ON_GPU)
    }


def _graphs(graph: Any, *, is_by_xla: bool) -> Iterator[tuple[Any, bool]]:
    """Yields `graph` and those of the functions that it calls, and whether XLA compiles each."""
    # Branches and bodies of loops too: they are attributes as any function that is called.
    seen, waiting = set(), [(graph, is_by_xla)]
    while waiting:
        graph, is_by_xla = waiting.pop()
        if (id(graph), is_by_xla) in seen:
            continue
        seen.add((id(graph), is_by_xla))
        yield graph, is_by_xla
        for op in graph.get_operations():
            for name in _called(op.node_def):
                called = graph._get_function(name)
                compiled = is_by_xla or op.node_def.attr["_XlaMustCompile"].b
                waiting.append((called.graph, compiled))


def _called(node: Any) -> Iterator[str]:
    """Yields the names of the functions that a node calls."""
    for name, value in node.attr.items():
        if name.startswith("_"):  # hints: the functions that a gradient would call
            continue
        if value.HasField("func"):
            yield value.func.name
        yield from (each.name for each in value.list.func)


@functools.cache
def _has_kernel(op: str, types: Types, devices: frozenset[str]) -> bool:
    chosen = dict(types)
    return any(
        kernel.device_type in devices
        and not kernel.label  # such a kernel is used only where it is asked for
        and all(
            set(chosen.get(constraint.name, ())) <= _names(constraint.allowed_values.list.type)
            for constraint in kernel.constraint
        )
        for kernel in kernels.get_registered_kernels_for_op(op).kernel
    )


def _types(op: Any) -> Types:
    """Returns the attributes of an operation that are types, by name."""
    found = []
    for name, value in sorted(op.node_def.attr.items()):
        if name.startswith("_"):
            continue
        if value.HasField("type"):
            found.append((name, (tf.as_dtype(value.type).name,)))
        elif value.list.type:
            found.append((name, tuple(sorted(_names(value.list.type)))))
    return tuple(found)


def _names(types: Iterable[int]) -> set[str]:
    return {tf.as_dtype(each).name for each in types}


def _source(op: Any) -> str:
    """Returns file, line and function of this project where `op` was made."""
    for frame in reversed(op.traceback):
        path = Path(frame.filename)
        if path.is_relative_to(PROJECT) and ".venv" not in path.parts:
            return f"{path.relative_to(PROJECT)}:{frame.lineno} {frame.name}"
    return op.name
