"""Say so when a compiled optimizer step is compiled anew for one pattern of missing gradients after the other."""

from __future__ import annotations

import types
import warnings
import weakref
from collections.abc import Callable

from dropbp_fx import _torch

#: A step is compiled twice in ordinary training too: before and after it has state.
_USUAL = 3


class CompiledStepWatch:
    """Counts how often Dynamo compiles an optimizer's step, and warns once.

    Args:
        dropped: tells how often branches have been dropped so far. A step that is compiled with nothing dropped since the
            last time is not about this backend's gradients.
    """

    def __init__(self, dropped: Callable[[], int]) -> None:
        self._dropped = dropped
        self._seen = 0
        self._counts: dict[types.CodeType, int] = {}
        self._said = False
        me = weakref.ref(self)

        def look(code: types.CodeType) -> None:
            watch = me()
            if watch is not None:
                watch.look(code)

        _torch.on_compiled(look)

    def look(self, code: types.CodeType) -> None:
        """Take note of code that Dynamo has compiled."""
        if self._said or code.co_name != "step" or "optim" not in code.co_filename:
            return
        dropped = self._dropped()
        if dropped == self._seen:
            return
        self._seen = dropped
        self._counts[code] = self._counts.get(code, 0) + 1
        if self._counts[code] > _USUAL:
            self._said = True
            warnings.warn(
                "A compiled optimizer step is being compiled anew for each pattern of missing gradients, and will run "
                "eagerly once Dynamo's recompile limit is reached. Leave optimizer.step uncompiled and make the optimizer "
                "with fused=True: it is as fast, and skips parameters without gradients.",
                stacklevel=2,
            )
