"""Hand graphs to whoever wants to see them: the files of ``dump_graphs()`` and PyTorch's structured trace (tlparse).

The engine calls :func:`wanted` and :func:`emit` where graphs arise. Nobody listens most of the time, so whatever takes
work to make is made only where :func:`wanted` says so.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator

from dropbp_fx import _torch

#: Receives the name of an artifact, a path with slashes, and its text.
Listener = Callable[[str, str], None]
_listener: contextvars.ContextVar[Listener | None] = contextvars.ContextVar("dropbp_fx_artifacts", default=None)


def wanted() -> bool:
    """Whether somebody receives artifacts of this thread."""
    return _listener.get() is not None or _torch.structured_trace_is_on()


def emit(name: str, text: str) -> None:
    """Hand an artifact on. ``name`` is a path with slashes and an ending."""
    listener = _listener.get()
    if listener is not None:
        listener(name, text)
    _torch.structured_trace_artifact(f"dropbp_fx_{name.replace('/', '_')}", text)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within the block, in this thread, artifacts go to ``listener``."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
