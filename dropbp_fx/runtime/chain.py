"""Run consecutive regions under one autograd node.

AOTAutograd surrounds compiled code with what any graph might need: writing to inputs, returning views of them, subclasses,
symbolic sizes. Most regions need none of it (``_torch.FlatCode`` tells), but a step with a region for every branch
would pay for it dozens of times, and for as many autograd nodes. So the code of regions that follow each other runs in one
node, a chain, that does between them what autograd would: hand gradients on, add up those of values with several uses, and
let go of what was saved as soon as it has been used.

A chain holds the gradients of its parameters until all of it is done, so chains are short where parameters are large.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dropbp_fx import _torch
from dropbp_fx.runtime.copies import exact_copy
from dropbp_fx.runtime.graphed import GraphedForward
from dropbp_fx.runtime.plan import Step
from dropbp_fx.runtime.recorded import RecordedRegion
from dropbp_fx.runtime.second_order import refusing_second_derivatives, way_to
from dropbp_fx.runtime.undefined import UndefinedGradients

#: Bytes of gradients that a chain may hold back.
_HELD_BACK = 2**26


@dataclasses.dataclass(slots=True)
class _ChainedStep:
    """One region in a chain.

    Attributes:
        step: the region's part in the plan.
        inputs: slots it reads.
        outputs: slots it writes.
        dead: slots that nobody reads afterwards.
        forward: its code.
        backward: that of its backward, ``None`` where it runs forward-only.
        unsafe_views: outputs that share memory with what its backward may need.
        tangents: outputs whose gradients its backward takes: position, slot, and what they look like.
        undefined: tells which gradients exist where some of those do not, ``None`` where all of them always do.
        graded: for each gradient that the backward returns the slot it belongs to, ``None`` where there is none.
        passed: pairs (output slot, earlier slot) of a forward-only region: that output's gradient is that slot's.
        donated: positions in what was saved of the tensors that the backward may write over.
    """

    step: Step
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dead: tuple[int, ...]
    forward: _torch.BoxedCode
    backward: _torch.BoxedCode | None
    unsafe_views: tuple[int, ...]
    tangents: tuple[tuple[int, int, _torch.TangentLike], ...]
    undefined: UndefinedGradients | None
    graded: tuple[int | None, ...]
    passed: tuple[tuple[int, int], ...]
    donated: tuple[int, ...]


class Chain:
    """Regions that run under one autograd node.

    Args:
        steps: consecutive steps of a plan, all with flat code.
        needed: slots that are read after the last of them (not kept).
    """

    def __init__(self, steps: Sequence[Step], needed: Collection[int]) -> None:
        self._steps = [_chained_step(step) for step in steps]
        made = {slot for step in self._steps for slot in step.outputs}
        wanted = dict.fromkeys(slot for step in self._steps for slot in step.graded if slot is not None)
        wanted.update(dict.fromkeys(source for step in self._steps for _, source in step.passed))
        #: Slots of values from before the chain that get a gradient from it.
        self.wanted = tuple(slot for slot in wanted if slot not in made)
        #: Slots of the values it hands on that carry a gradient.
        carrying = {slot for step in self._steps for _, slot, _ in step.tangents}
        carrying |= {slot for step in self._steps for slot, _ in step.passed}
        self.carrying = tuple(
            slot for step in self._steps for slot in step.outputs if slot in needed and slot in carrying
        )
        codes = [step.flat for step in steps if step.flat is not None and not step.forward_only]
        self._deterministic = all(code.deterministic for code in codes)

    def run(self, values: list[Any], graphed: GraphedForward | None = None) -> None:
        """Run the regions on ``values``, which is indexed by slots; as CUDA graphs where ``graphed`` has some."""
        if not self.carrying:
            with torch.no_grad():
                self.forward(values, graphed)
            return
        wanted = [values[slot] for slot in self.wanted]
        carried = _ChainFunction.apply(self, values, [way_to(wanted)], graphed, *wanted)
        for slot, value in zip(self.carrying, carried, strict=True):
            values[slot] = value

    def forward(self, values: list[Any], graphed: GraphedForward | None) -> list[Sequence[Any] | RecordedRegion]:
        """Run the forwards; for each region that has a backward what it saved."""
        saved: list[Sequence[Any] | RecordedRegion] = []
        with _no_autocast():
            for step in self._steps:
                recorded = None if graphed is None else graphed.forward(step.step, values)
                if recorded is not None:
                    outputs: Sequence[Any] = [value.detach() for value in recorded.outputs]
                    if step.backward is not None:
                        saved.append(recorded)
                else:
                    outputs = self._run(step, values, saved, graphed)
                for slot in step.dead:
                    values[slot] = None
                for slot, value in zip(step.outputs, outputs, strict=True):
                    values[slot] = value
                for slot in step.dead:
                    if slot in step.outputs:
                        values[slot] = None
        return saved

    def _run(
        self,
        step: _ChainedStep,
        values: list[Any],
        saved: list[Sequence[Any] | RecordedRegion],
        graphed: GraphedForward | None,
    ) -> Sequence[Any]:
        """Run one region's code; its outputs."""
        if graphed is None:
            arguments = [values[slot] for slot in step.inputs]
            for slot in step.dead:
                values[slot] = None
            made = step.forward(arguments)
        else:
            arguments = graphed.arguments(step.step, values)
            for slot in step.dead:
                values[slot] = None
            made = graphed.first_run(step.step, arguments)
        count = len(step.outputs)
        if step.backward is not None:
            saved.append(made[count:])
        outputs = list(made[:count])
        for position in step.unsafe_views:
            outputs[position] = _torch.unsafe_view(outputs[position])
        return outputs

    def check(self) -> None:
        """Refuse a backward that the regions' code is not compiled for.

        Raises:
            RuntimeError: it is to be deterministic unlike its forward.
        """
        if not self._deterministic and torch.are_deterministic_algorithms_enabled():
            raise RuntimeError(
                "torch.use_deterministic_algorithms was switched on between this forward and its backward. Switch it on "
                "before the forward, so that the backward is compiled accordingly."
            )

    def backward(
        self,
        saved: list[list[Any] | RecordedRegion],
        gradients: dict[int, Tensor],
        *,
        again: bool,
        graphed: GraphedForward | None = None,
    ) -> None:
        """Run the backwards.

        Args:
            saved: what :meth:`forward` gave; emptied.
            gradients: by slot those of what the chain hands on; becomes those of what it took.
            again: what was saved may be needed once more.
            graphed: the forward's, if it used CUDA graphs.
        """
        with _no_autocast():
            for step in reversed(self._steps):
                if step.backward is None:
                    for slot, source in step.passed:
                        gradient = gradients.pop(slot, None)
                        if graphed is not None and gradient is not None:
                            graphed.handed_on(slot, source, gradient, gradients)
                        _add(gradients, source, gradient)
                    continue
                kept = saved.pop()
                defined = [position for position, slot, _ in step.tangents if slot in gradients]
                if not defined:
                    continue
                if isinstance(kept, RecordedRegion):
                    if graphed is not None and not again and len(defined) == len(step.tangents):
                        found = graphed.backward(step.step, kept, step.tangents, step.graded, gradients)
                        if found is not None:
                            for slot, gradient in found:
                                _add(gradients, slot, gradient)
                            continue
                    arguments = list(kept.saved)
                else:
                    arguments = kept
                if graphed is not None:
                    for _, slot, _ in step.tangents:
                        if slot in gradients:
                            gradients[slot] = graphed.own(slot, gradients[slot])
                if again:
                    for position in step.donated:
                        arguments[position] = exact_copy(arguments[position])
                for _, slot, like in step.tangents:
                    arguments.append(_as_expected(gradients.pop(slot, None), like))
                targets = step.graded
                if len(defined) < len(step.tangents) and step.undefined is not None:
                    reached = step.undefined.reached(defined)
                    targets = tuple(slot if k in reached else None for k, slot in enumerate(targets))
                for target, gradient in zip(targets, step.backward(arguments), strict=True):
                    if target is not None:
                        _add(gradients, target, gradient)


def _chained_step(step: Step) -> _ChainedStep:
    code = step.flat
    assert code is not None
    forward_only = step.forward_only or code.backward is None
    graded: list[int | None] = []
    if not forward_only:
        graded = [None] * len(step.inputs)
        for position in code.graded:
            graded[position] = step.inputs[position]
    tangents: tuple[tuple[int, int, _torch.TangentLike], ...] = ()
    if not forward_only:
        tangents = tuple((j, step.outputs[j], like) for j, like in zip(code.tangents, code.tangent_like, strict=True))
    return _ChainedStep(
        step=step,
        inputs=step.inputs,
        outputs=step.outputs,
        dead=step.dead,
        forward=code.forward,
        backward=None if forward_only else code.backward,
        unsafe_views=code.unsafe_views,
        tangents=tangents,
        undefined=step.undefined,
        graded=tuple(graded),
        passed=tuple((step.outputs[position], source) for position, source in step.passed),
        donated=code.donated,
    )


def chained(steps: Sequence[Step], held_back: Sequence[int], returned: Collection[int]) -> tuple[Chain | Step, ...]:
    """Put the steps of a plan into chains.

    Args:
        steps: the plan.
        held_back: for each of them the bytes of its parameters' gradients.
        returned: slots that are read after the last step.
    """
    parts: list[Chain | Step] = []
    needed = set(returned)
    for first, last in reversed(list(_runs(steps, held_back))):
        mine = steps[first:last]
        parts.append(Chain(mine, needed) if mine[0].flat is not None else mine[0])
        for step in mine:
            needed.update(step.inputs)
            needed.update(source for _, source in step.passed)
    return tuple(reversed(parts))


def _runs(steps: Sequence[Step], held_back: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The bounds of the chains, and of the steps that are in none."""
    first, held = 0, 0
    for number, step in enumerate(steps):
        alone = step.flat is None
        mine = 0 if step.forward_only else held_back[number]
        if number > first and (alone or (held and mine and held + mine > _HELD_BACK)):
            yield first, number
            first, held = number, 0
        held += mine
        if alone:
            yield number, number + 1
            first, held = number + 1, 0
    if first < len(steps):
        yield first, len(steps)


def _add(gradients: dict[int, Tensor], slot: int, gradient: Tensor | None) -> None:
    if gradient is not None:
        before = gradients.get(slot)
        gradients[slot] = gradient if before is None else before + gradient


def _as_expected(gradient: Tensor | None, like: _torch.TangentLike) -> Tensor:
    """A tangent with the strides that the code was compiled for; zero where nobody differentiated."""
    if gradient is None:
        return torch.empty_strided(like.size, like.stride, dtype=like.dtype, device=like.device).zero_()
    if gradient.stride() == like.stride and gradient.shape == like.size:
        return gradient
    return torch.empty_strided(like.size, like.stride, dtype=gradient.dtype, device=gradient.device).copy_(gradient)


def _no_autocast() -> contextlib.AbstractContextManager[Any]:
    return _torch.without_autocast() if _torch.autocast_is_on() else contextlib.nullcontext()


class _ChainFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        chain: Chain,
        values: list[Any],
        way: list[Tensor | None],
        graphed: GraphedForward | None,
        *wanted: Tensor,
    ) -> Any:
        saved = chain.forward(values, graphed)
        ctx.chain, ctx.way, ctx.graphed = chain, way[0], graphed
        ctx.kept = [len(mine) if not isinstance(mine, RecordedRegion) else mine for mine in saved]
        tensors = [value for mine in saved if not isinstance(mine, RecordedRegion) for value in mine]
        if graphed is not None:
            graphed.opened()
            tensors.append(torch.empty(0))  # PyTorch refuses a second backward only of what saved some tensor
        # a view would keep its base, and its base's version, alive in autograd's eyes
        ctx.save_for_backward(*[value.detach() if _torch.is_view(value) else value for value in tensors])
        ctx.set_materialize_grads(False)
        return tuple([values[slot] for slot in chain.carrying])

    @staticmethod
    def backward(ctx: Any, *tangents: Any) -> Any:
        chain: Chain = ctx.chain
        graphed: GraphedForward | None = ctx.graphed if all(map(_torch.has_memory, tangents)) else None
        chain.check()
        everything = ctx.saved_tensors
        ctx.maybe_clear_saved_tensors()
        saved: list[list[Any] | RecordedRegion] = []
        start = 0
        for kept in ctx.kept:
            if isinstance(kept, RecordedRegion):
                saved.append(kept)
                continue
            saved.append(list(everything[start : start + kept]))
            start += kept
        del everything
        gradients = {
            slot: tangent for slot, tangent in zip(chain.carrying, tangents, strict=True) if tangent is not None
        }
        if not torch.is_grad_enabled():
            del tangents
        again = _torch.keeps_graph()
        with torch.no_grad():
            if graphed is None:
                chain.backward(saved, gradients, again=again)
            else:
                with graphed.running():
                    chain.backward(saved, gradients, again=again, graphed=graphed)
                    for slot in chain.wanted:
                        if slot in gradients:
                            gradients[slot] = graphed.own(slot, gradients[slot])
                if not again:
                    graphed.closed()
        found = [gradients.get(slot) for slot in chain.wanted]
        if torch.is_grad_enabled():
            found = refusing_second_derivatives(found, ctx, ctx.way, tangents)
        return None, None, None, None, *found
