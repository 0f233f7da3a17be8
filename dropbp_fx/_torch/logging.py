"""PyTorch's structured trace.

| hook | why it is needed |
| --- | --- |
| ``torch._logging._internal.trace_structured`` | graphs show up in tlparse |
| ``torch._logging._internal.trace_log`` | they are not written where nobody reads them |
"""

from __future__ import annotations


def structured_trace_is_on() -> bool:
    """Whether somebody reads PyTorch's structured trace: ``TORCH_TRACE`` is set, or a handler was added."""
    from torch._logging import _internal

    return any(getattr(handler, "root_dir", "elsewhere") is not None for handler in _internal.trace_log.handlers)


def structured_trace_artifact(name: str, text: str) -> None:
    """Put a text into PyTorch's structured trace, where tlparse finds it."""
    from torch._logging._internal import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=lambda: text)
