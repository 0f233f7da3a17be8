"""An inner compiler that runs graphs as they are and counts the floating-point operations they do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from dropbp_fx import _torch
from dropbp_fx.graph.cost import node_flops


@dataclasses.dataclass
class FlopCounter:
    """Pass :attr:`inner` to ``dropbp_backend``; what its forwards and backwards did adds up here."""

    forward: int = 0
    backward: int = 0

    @property
    def inner(self) -> tuple[_torch.Compiler, _torch.Compiler]:
        return self._compiler("forward"), self._compiler("backward")

    def reset(self) -> None:
        self.forward = self.backward = 0

    def _compiler(self, side: str) -> _torch.Compiler:
        def compile_graph(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            run = _torch.run_graph_eagerly(gm, inputs)
            flops = sum(node_flops(node) for node in gm.graph.nodes)

            def counted(arguments: Any) -> Any:
                setattr(self, side, getattr(self, side) + flops)
                return run(arguments)

            counted._boxed_call = True  # type: ignore[attr-defined]
            return counted

        return compile_graph
