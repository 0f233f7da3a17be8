"""CUDA graphs of compiled code, and where compiled code gets its memory from.

| hook | why it is needed |
| --- | --- |
| ``empty_strided_cuda`` and ``empty_strided_cpu`` in code that Inductor generated | results are put where they are to lie |
| ``_dynamo_static_input_type`` in ``node.meta`` | parameters and buffers stay where they are |
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from dropbp_fx._torch.flat_code import BoxedCode

_Made = TypeVar("_Made")

#: What Dynamo writes on such inputs.
_STATIC = "_dynamo_static_input_type"

#: Gets memory: size, strides and type.
Allocate = Callable[[Sequence[int], Sequence[int], torch.dtype], Tensor]


class GraphCapture:
    """Captures work on one CUDA device. All graphs share one pool for what they need while they run, so they must run one
    after the other, and what lies in the pool is gone when the next one runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        # a pool is gone with its last graph
        self._keeping_the_pool = self.capture(lambda: torch.zeros(1, device=device))[0]

    def capture(self, work: Callable[[], _Made]) -> tuple[Callable[[], None], _Made]:
        """Record what ``work`` issues, nothing of which runs yet; what runs all of it, and what ``work`` returned.

        Raises:
            RuntimeError: ``work`` does what no graph can hold, such as wait for the device.
        """
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                made = work()
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph.replay, made


def graph_capture(device: torch.device) -> GraphCapture | None:
    """What captures work on the device, ``None`` for one without graphs."""
    return GraphCapture(device) if device.type == "cuda" else None


def is_capturing(device: torch.device) -> bool:
    """Whether somebody captures what this thread issues."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def has_memory(value: Tensor | None) -> bool:
    """``False`` for a tensor that stands for others, such as a batched one of ``torch.func.vmap``."""
    try:
        return value is None or value.data_ptr() >= 0
    except RuntimeError:
        return False


def stays_in_place(placeholder: fx.Node) -> bool:
    """Whether an input of Dynamo's graph is a parameter or a buffer: in one place at every call unless somebody moves it."""
    known = placeholder.meta.get("tensor_dict") or {}
    return isinstance(placeholder.meta.get("example_value"), torch.nn.Parameter) or _STATIC in known


@contextlib.contextmanager
def allocating(code: BoxedCode, device: torch.device, allocate: Callable[[Allocate], Allocate]) -> Iterator[bool]:
    """Within the block what ``allocate`` makes of the allocating function stands in for it in Inductor's ``code``.

    Yields:
        Whether it does; ``False`` for code of another compiler.
    """
    name = f"empty_strided_{device.type}"
    namespace = _namespace(code.function, name)
    if namespace is None:
        yield False
        return
    original: Allocate = namespace[name]
    instead, thread = allocate(original), threading.get_ident()

    def allocate_here(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        mine = threading.get_ident() == thread  # other threads may run this code too
        return (instead if mine else original)(size, stride, dtype)

    namespace[name] = allocate_here
    try:
        yield True
    finally:
        namespace[name] = original


def _namespace(function: Any, name: str) -> dict[str, Any] | None:
    """The globals of generated code that use ``name``: those of ``function``, or of one that it wraps."""
    pending, seen = [function], set[int]()
    while pending:
        found = pending.pop()
        found = getattr(found, "__func__", found)
        if id(found) in seen:
            continue
        seen.add(id(found))
        names = getattr(found, "__globals__", None)
        if names is not None and name in names:
            return names  # type: ignore[no-any-return]
        for cell in getattr(found, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # an empty cell
                if callable(cell.cell_contents):
                    pending.append(cell.cell_contents)
    return None
