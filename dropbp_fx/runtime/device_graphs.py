"""Run a program's regions as CUDA graphs: one for each region's forward and backward, composed to any pattern.

Starting a graph costs the host about as much as one kernel, so a step costs it a few launches a branch. Memory that graphs
name cannot move, so what a region keeps for its backward lies in a slot, and there are as many slots as regions are kept at
once; a region is recorded anew for each slot that it comes to use, and slots are given out so that this is seldom needed.

One forward at a time, until its backward is done, has the memory. Others run without graphs, as do regions that return
something to the caller, those whose inputs are not all tensors on the device, and any region the first time.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import warnings
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dropbp_fx import _torch
from dropbp_fx.graph.regions import RegionProgram
from dropbp_fx.runtime.fixed_memory import GradientBuffers, ValueBuffers, matched
from dropbp_fx.runtime.placement import Layout, Placement
from dropbp_fx.runtime.plan import Planner, Step
from dropbp_fx.runtime.recorded import (
    Capturing,
    KeptMemory,
    RecordedRegion,
    Slot,
    kept_memory,
)


class CudaGraphsWarning(UserWarning):
    """CUDA graphs were asked for, and what runs without them; the message has the cause and the remedy."""


class Holder(Protocol):
    """Who has a program's memory."""

    done: bool


#: A region is recorded upon at most this many slots; upon others it runs without a graph.
RECORDINGS = 8
#: Slots that no forward needed for this many forwards are given up.
_FORWARDS_UNUSED = 64
#: If most of so many forwards find the memory in use, that is said.
_FORWARDS_WATCHED = 32


class Code:
    """What is known of a variant's code: kept with it, since regions that look alike share it."""

    def __init__(self, code: _torch.FlatCode) -> None:
        self.code = code
        self.placement: Placement | None = None
        self.kept: dict[frozenset[int], KeptMemory] = {}
        self.backward_ran = False
        self.refused = ""


@dataclasses.dataclass
class _Slots:
    """The slots of regions that keep memory of one layout."""

    slots: list[Slot] = dataclasses.field(default_factory=list)
    most: int = 0


class GraphMemory:
    """What all programs of a backend share on one device: what captures, and what is known of their code.

    Args:
        device: where programs run.
        capturing: what records graphs there.

    Attributes:
        recorded: how many graphs were recorded.
        replayed: how often a region's forward ran as a graph.
        run_without: why others did not, and how often.
    """

    def __init__(self, device: torch.device, capturing: Capturing) -> None:
        self.device = device
        self.capturing = capturing
        self.lock = threading.RLock()
        self.recorded = 0
        self.replayed = 0
        self.run_without: collections.Counter[str] = collections.Counter()
        self._codes: dict[int, Code] = {}
        self._stream: Any = None

    def code(self, code: _torch.FlatCode) -> Code:
        """What is known of a variant's code."""
        known = self._codes.get(id(code))
        if known is None:
            known = self._codes[id(code)] = Code(code)
        return known

    def follow_stream(self) -> None:
        """Graphs of one step must not overtake those of the one before on another stream."""
        if self.device.type != "cuda":
            return
        current = torch.cuda.current_stream(self.device)
        if self._stream is not None and self._stream != current:
            current.wait_stream(self._stream)
        self._stream = current


class DeviceGraphs:
    """The graphs of one program.

    Args:
        planner: the program, and what its regions hand on.
        memory: what the backend's programs share.
    """

    def __init__(self, planner: Planner, memory: GraphMemory) -> None:
        self.program = planner.program
        self.memory = memory
        self.staying = self.program.staying.union(self.program.constants)
        self.recordable = frozenset(
            number for number in range(len(self.program.regions)) if _may_record(self.program, number, memory.device)
        )
        self.values = ValueBuffers(self.program, self.recordable, memory.device)
        self.gradients = GradientBuffers(planner, memory.device)
        self.passing = [
            frozenset(
                k
                for k, slot in enumerate(region.inputs)
                if slot not in self.staying and slot not in self.values.lasting
            )
            for region in self.program.regions
        ]
        self.forward_only: dict[tuple[int, int], RecordedRegion] = {}
        self._slots: dict[tuple[Layout, ...], _Slots] = {}
        self._forwards = 0
        self._in_use = 0
        self._holder: weakref.ref[Holder] | None = None

    def free(self) -> bool:
        """Whether a forward may have the memory: nobody has it, and nobody captures what this thread issues."""
        holder = None if self._holder is None else self._holder()
        self._forwards += 1
        if holder is None or holder.done:
            return not _torch.is_capturing(self.memory.device)
        self.memory.run_without["another forward waits for its backward"] += len(self.recordable)
        self._in_use += 1
        if self._forwards == _FORWARDS_WATCHED and 2 * self._in_use > self._forwards:
            warnings.warn(
                f"{self._in_use} of the first {self._forwards} forwards of a compiled graph ran without CUDA graphs: "
                "the backward of one before was still to come: layers that are compiled one by one share their code, and "
                "several forwards for one backward need memory each. Compile the whole model, call backward() for each "
                "forward, or leave CUDA graphs out.",
                CudaGraphsWarning,
                stacklevel=2,
            )
        return False

    def hold(self, holder: Holder) -> None:
        """The memory is one forward's, until it is done or gone."""
        self._holder = weakref.ref(holder)

    def slots_for(self, steps: Sequence[Step]) -> dict[int, Slot]:
        """A slot for each region of a pattern that keeps something and is known to."""
        if self._forwards % _FORWARDS_UNUSED == 0:
            self._give_up_unused()
        wanting: dict[tuple[Layout, ...], list[Step]] = {}
        for step in steps:
            kept = self.kept(step)
            if kept is not None and kept.layout:
                wanting.setdefault(kept.layout, []).append(step)
        assigned: dict[int, Slot] = {}
        for layout, mine in wanting.items():
            own = self._slots.setdefault(layout, _Slots())
            own.most = max(own.most, len(mine))
            while len(own.slots) < len(mine):
                own.slots.append(Slot(layout, self.memory.device))
            keys = [(step.region, id(step.flat)) for step in mine]
            wanted = [[k for k, slot in enumerate(own.slots) if key in slot.recorded] for key in keys]
            for step, number in zip(mine, matched(wanted, len(own.slots)), strict=True):
                assigned[step.region] = own.slots[number]
        return assigned

    def kept(self, step: Step) -> KeptMemory | None:
        """What a step keeps for its backward, ``None`` where it keeps nothing, is not known yet, or runs without a graph."""
        if step.flat is None or step.forward_only or step.region not in self.recordable or step.flat.backward is None:
            return None
        code = self.memory.code(step.flat)
        if code.placement is None or code.refused:
            return None
        passing = self.passing[step.region]
        kept = code.kept.get(passing)
        if kept is None:
            outputs = len(self.program.regions[step.region].outputs)
            kept = code.kept[passing] = kept_memory(code.placement, outputs, passing)
        return kept

    def recordings(self, key: tuple[int, int]) -> int:
        """Upon how many slots a region is recorded."""
        return sum(key in slot.recorded for own in self._slots.values() for slot in own.slots)

    def _give_up_unused(self) -> None:
        for own in self._slots.values():
            del own.slots[own.most :]
            own.most = 0


def why_unusable(program: RegionProgram, device: torch.device) -> str | None:
    """Why no region of a program can be a graph, and what to do; ``None`` if some can."""
    if program.has_symbols:
        return (
            "its shapes are symbolic, and a graph has the addresses of one shape. Compile with dynamic=False: each shape "
            "then has graphs of its own"
        )
    if not any(_may_record(program, number, device) for number in range(len(program.regions))):
        return (
            "each of its branches returns a value to the caller, whose memory must not be written over, or takes something "
            "that is no tensor on that device. Compile the whole model, and have it return the loss, not all hidden states"
        )
    return None


def _may_record(program: RegionProgram, number: int, device: torch.device) -> bool:
    region = program.regions[number]
    return (
        bool(region.branches)
        and program.returned.isdisjoint(region.outputs)
        and all(isinstance(example, Tensor) and example.device == device for example in region.examples)
    )
