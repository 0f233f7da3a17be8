"""One forward, and its backward, of which regions run as CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from dropbp_fx import _torch
from dropbp_fx.runtime.copies import exact_copy
from dropbp_fx.runtime.device_graphs import RECORDINGS, Code, DeviceGraphs
from dropbp_fx.runtime.placement import Layout, copy_into, observe
from dropbp_fx.runtime.plan import Step
from dropbp_fx.runtime.recorded import KeptMemory, RecordedRegion, Slot, record_backward, record_forward


class GraphedForward:
    """One forward, and its backward, that use a program's graphs.

    Args:
        graphs: the program's.
        slots: for regions that keep something the memory they keep it in.
    """

    @classmethod
    def begin(cls, graphs: DeviceGraphs, steps: Sequence[Step]) -> GraphedForward | None:
        """Have a forward use graphs, ``None`` while another one has the memory."""
        with graphs.memory.lock:
            if not graphs.free():
                return None
            forward = cls(graphs, graphs.slots_for(steps))
            graphs.hold(forward)
            return forward

    def __init__(self, graphs: DeviceGraphs, slots: dict[int, Slot]) -> None:
        self._graphs = graphs
        self._memory = graphs.memory
        self._slots = slots
        self._present: dict[int, Tensor] = {}  # values that a buffer holds
        self._made: set[int] = set()  # those that lie nowhere else
        self._resident: dict[int, int] = {}  # for each buffer of gradients, by address, whose it holds
        self._open = 1
        self.done = False

    # ---- whose the memory is ----------------------------------------------------------------------------------------

    def opened(self) -> None:
        """Some of the forward's regions will have a backward."""
        self._open += 1

    def closed(self) -> None:
        """The forward, or the backward of some of its regions, is over: when all are, the memory is free."""
        self._open -= 1
        self.done = self._open == 0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Graphs run within the block, and none of another thread."""
        with self._memory.lock:
            self._memory.follow_stream()
            yield

    # ---- forward -------------------------------------------------------------------------------------------------------

    def forward(self, step: Step, values: list[Any]) -> RecordedRegion | None:
        """Run a region's graph, recording it if need be; ``None`` if the region has to run without one."""
        assert step.flat is not None
        if step.region not in self._graphs.recordable:
            return None
        code = self._memory.code(step.flat)
        if code.placement is None or code.refused:
            self._note_without(code.refused or "the first run of its code")
            return None
        key = (step.region, id(step.flat))
        slot = self._slots.get(step.region)
        keeps = self._graphs.kept(step)
        if keeps is not None and keeps.layout and slot is None:
            self._note_without("the first forward of its code")
            return None
        store = self._graphs.forward_only if slot is None else slot.recorded
        found = store.get(key)
        if found is not None and not self._fits(found, values):
            found = None
        if found is None:
            if slot is not None and key not in store and self._graphs.recordings(key) >= RECORDINGS:
                self._note_without(f"it is recorded upon {RECORDINGS} slots, and upon none that is free")
                return None
            found = self._record(step, code, values, slot, keeps)
            if found is None:
                self._note_without(code.refused)
                return None
            store[key] = found
        self._bring(found.moving, values)
        found.run()
        self._memory.replayed += 1
        self._present.update(zip(step.outputs, found.outputs, strict=True))
        self._made.update(step.outputs)
        return found

    def _note_without(self, why: str) -> None:
        self._memory.run_without[why] += 1

    def arguments(self, step: Step, values: Sequence[Any]) -> list[Any]:
        """The inputs of a region that runs without a graph: what it saves must outlive the buffers."""
        return [exact_copy(values[slot]) if slot in self._made else values[slot] for slot in step.inputs]

    def unshare(self, slots: Sequence[int], values: list[Any]) -> None:
        """The same for a region that autograd runs by itself."""
        for slot in self._made.intersection(slots):
            values[slot] = exact_copy(values[slot])
            self._made.discard(slot)

    def first_run(self, step: Step, arguments: list[Any]) -> Sequence[Any]:
        """Run a region without a graph; where its code was not run before, see where its results lie."""
        assert step.flat is not None
        code = self._memory.code(step.flat)
        if code.placement is not None or step.region not in self._graphs.recordable:
            return step.flat.forward(arguments)
        with _torch.compile_lock():
            made, code.placement = observe(step.flat.forward, arguments, self._memory.device)
        outputs = len(step.outputs)
        if not all(code.placement.on_device[:outputs]):
            code.refused = "one of its outputs is no tensor on the device"
        return made

    def _bring(self, moving: Sequence[tuple[int, Tensor]], values: Sequence[Any]) -> None:
        """Have buffers hold what a region reads."""
        for slot, place in moving:
            if self._present.get(slot) is not place:
                copy_into(place, values[slot])
                self._present[slot] = place

    def _fits(self, region: RecordedRegion, values: Sequence[Any]) -> bool:
        """Whether what stays in place is where it was, and the other inputs look as they did."""
        return region.still_fits(values) and all(
            self._present.get(slot) is place or Layout.of(values[slot]) == Layout.of(place)
            for slot, place in region.moving
        )

    def _record(
        self, step: Step, code: Code, values: Sequence[Any], slot: Slot | None, keeps: KeptMemory | None
    ) -> RecordedRegion | None:
        assert step.flat is not None
        assert code.placement is not None
        graphs, placement = self._graphs, code.placement
        staying = tuple(slot for slot in step.inputs if slot in graphs.staying)
        inputs = [
            values[s] if s in graphs.staying else graphs.values.buffer(s, Layout.of(values[s])) for s in step.inputs
        ]
        layouts = [layout for layout in placement.results[: len(step.outputs)] if layout is not None]
        outputs = [graphs.values.buffer(s, layout) for s, layout in zip(step.outputs, layouts, strict=True)]
        moving = tuple((s, place) for s, place in zip(step.inputs, inputs, strict=True) if s not in graphs.staying)
        self._bring(moving, values)
        nothing = KeptMemory((), (), ())
        try:
            with _torch.compile_lock():
                run, saved = record_forward(
                    self._memory.capturing, step.flat.forward, placement, inputs, outputs, keeps or nothing, slot
                )
        except RuntimeError as error:
            code.refused = str(error)
            return None
        self._memory.recorded += 1
        addresses = tuple(values[slot].data_ptr() for slot in staying)
        return RecordedRegion((staying, addresses), moving, tuple(outputs), saved, run)

    # ---- backward ------------------------------------------------------------------------------------------------------

    def backward(
        self,
        step: Step,
        region: RecordedRegion,
        tangents: Sequence[tuple[int, int, _torch.TangentLike]],
        graded: Sequence[int | None],
        gradients: dict[int, Tensor],
    ) -> list[tuple[int, Tensor]] | None:
        """Run the graph of a region's backward, recording it if need be.

        Args:
            step: the region's.
            region: its forward.
            tangents: the gradients it takes: position of the output, slot, and what it looks like; all are in ``gradients``.
            graded: for each of its inputs the slot that its gradient belongs to, if it has one.
            gradients: by slot; those that it takes are taken out.

        Returns:
            Slots and their gradients from this region, ``None`` if it has to run without a graph: nothing is done then.
        """
        assert step.flat is not None
        assert step.flat.backward is not None
        code = self._memory.code(step.flat)
        if not code.backward_ran or code.refused:
            code.backward_ran = True
            return None
        if region.backward is None and not self._record_backward(step, code, region, tangents, graded):
            return None
        recorded = region.backward
        assert recorded is not None
        given = [gradients.pop(slot) for _, slot, _ in tangents]
        for k, ((_, slot, _), place) in enumerate(zip(tangents, recorded.tangents, strict=True)):
            if self._resident.get(given[k].data_ptr()) == slot and given[k].data_ptr() != place.data_ptr():
                given[k] = exact_copy(given[k])  # the buffer may be another tangent's
            if self._resident.get(place.data_ptr()) == slot:
                del self._resident[place.data_ptr()]
        for place in recorded.tangents:
            self._make_room(place, gradients)
        for gradient, place in zip(given, recorded.tangents, strict=True):
            if gradient.data_ptr() != place.data_ptr() or Layout.of(gradient) != Layout.of(place):
                copy_into(place, gradient)
        for slot, home in recorded.homes:
            self._make_room(home, gradients)
            if slot not in gradients:
                self._resident[home.data_ptr()] = slot
        recorded.run()
        return [*recorded.homes, *recorded.copied_out()]

    def _record_backward(
        self,
        step: Step,
        code: Code,
        region: RecordedRegion,
        tangents: Sequence[tuple[int, int, _torch.TangentLike]],
        graded: Sequence[int | None],
    ) -> bool:
        assert step.flat is not None
        assert step.flat.backward is not None
        buffers = self._graphs.gradients
        places = [buffers.buffer(slot, Layout(like.size, like.stride, like.dtype)) for _, slot, like in tangents]
        if len({id(place) for place in places}) < len(places):
            return False
        inputs = dict(region.moving)
        homes: dict[int, Tensor] = {}
        for k, slot in enumerate(graded):
            if slot is not None and slot in inputs:
                home = buffers.buffer(slot, Layout.of(inputs[slot]))
                if all(home is not other for other in homes.values()):
                    homes[k] = home
        try:
            with _torch.compile_lock():
                region.backward = record_backward(
                    self._memory.capturing, step.flat.backward, region.saved, places, homes, graded
                )
        except RuntimeError as error:
            code.refused = str(error)
            return False
        self._memory.recorded += 1
        return True

    def _make_room(self, place: Tensor, gradients: dict[int, Tensor]) -> None:
        """A gradient that waits in a buffer which is about to be written moves out."""
        slot = self._resident.pop(place.data_ptr(), None)
        if slot is not None and slot in gradients:
            gradients[slot] = exact_copy(gradients[slot])

    def handed_on(self, slot: int, source: int, gradient: Tensor, gradients: dict[int, Tensor]) -> None:
        """The gradient of ``slot`` becomes that of ``source``."""
        if self._resident.get(gradient.data_ptr()) == slot:
            if source in gradients:
                del self._resident[gradient.data_ptr()]
            else:
                self._resident[gradient.data_ptr()] = source

    def own(self, slot: int, gradient: Tensor) -> Tensor:
        """A gradient in memory that no graph writes to."""
        return exact_copy(gradient) if self._resident.get(gradient.data_ptr()) == slot else gradient
