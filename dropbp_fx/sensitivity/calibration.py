"""Measure how dropping each branch changes the parameter gradients, in little more than half a backward a branch.

The reference procedure runs the whole step once for every branch. But dropping branch i changes nothing above it, so here
the step runs forward once; one exact backward goes down the model, and whenever it comes to a branch, a second one sets
out from there, carrying the gradient that is left when the branch is dropped, and is measured on its way down. Gradients
are reduced to norms region by region and never kept, and what the exact backward has passed is freed as in any other step.
What the exact backward has already sent past the branch to places below it (an encoder's output that every decoder
layer reads, a tied embedding) is remembered and joins in.

Branches for which that does not do, because they ran several times or because the exact backward may come to something
that matters only later (two towers that share a parameter), are measured by a backward from the loss each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from dropbp_fx import _torch
from dropbp_fx.runtime.plan import Step
from dropbp_fx.runtime.variants import RegionVariants
from dropbp_fx.sensitivity.isolated import Gradients, RegionRecord, run_isolated, squared_norm
from dropbp_fx.sensitivity.random_streams import RandomStreams, random_streams_kept
from dropbp_fx.sensitivity.sensitivity import Metric
from dropbp_fx.sensitivity.step_graph import StepGraph
from dropbp_fx.values import shown, takes


@dataclasses.dataclass
class _Pass:
    """One backward through isolated regions, and what it has found so far.

    Attributes:
        difference: it carries what dropping takes away from the gradients, rather than what is left of them.
        dropped: the branch that is dropped wherever it turns up.
        exact: the exact backward: what it comes to is freed, and branches are measured from where it is.
        squares: squared norms of gradients by leaf, where a leaf has one use.
        sums: gradients so far of leaves with several uses.
    """

    difference: bool = False
    dropped: int | None = None
    exact: bool = False
    squares: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    sums: dict[int, Tensor] = dataclasses.field(default_factory=dict)


class Calibration:
    """Drives the backward of one step; the driver of all isolated regions of its forward.

    Args:
        metric: see :class:`~dropbp_fx.sensitivity.sensitivity.Sensitivity`.
        on_branch: called whenever a branch has been measured.
    """

    def __init__(self, metric: Metric, on_branch: Callable[[], object]) -> None:
        self.probe = torch.zeros((), device="cpu", requires_grad=True)
        self._metric = metric
        self._on_branch = on_branch
        self._records: list[RegionRecord] = []
        self._random: dict[int, RandomStreams] = {}
        self._written: dict[int, tuple[Tensor, Tensor]] = {}
        self._passes: list[_Pass] = []
        self._graph: StepGraph | None = None
        self._inflow: dict[tuple[int, int], Tensor] = {}
        self._at_start: dict[int, Sequence[Tensor | None]] = {}
        self._found: dict[int, _Pass] = {}

    # ---- forward ---------------------------------------------------------------------------------------------------

    def protect(self, step: Step, variants: RegionVariants, values: Sequence[Any]) -> None:
        """Remember what a region is about to overwrite."""
        for k in variants.flow.mutated:
            original = values[step.inputs[k]]
            if isinstance(original, Tensor) and not original.requires_grad:
                self.keep(original)

    def keep(self, original: Tensor) -> None:
        """Remember what a tensor holds, to be put back by :meth:`restore`."""
        self._written.setdefault(id(original), (original, original.detach().clone()))

    def run(self, step: Step, variants: RegionVariants, branches: tuple[int, ...], values: Sequence[Any]) -> list[Any]:
        """Run a training step's region isolated."""
        streams = RandomStreams.now() if branches else None
        record, outputs = run_isolated(step, variants, branches, values, self)
        if not _torch.in_backward():  # a checkpoint's recomputation is thrown away
            self._records.append(record)
            if streams is not None:
                self._random[id(record)] = streams
        return outputs

    # ---- backward --------------------------------------------------------------------------------------------------

    def measure(self, loss: Tensor) -> dict[int, float]:
        """Drive the backward of ``loss``.

        Returns:
            The sensitivity of every branch that ran.

        Raises:
            RuntimeError: the step holds a reentrant activation checkpoint, whose inside only a backward shows, or
                parameters were freed after the forward.
        """
        self._check_memory()
        graph = self._graph = StepGraph(loss, self._records)
        from_loss = [b for b in graph.runs if not graph.is_all_below(b, self._metric)]
        exact = _Pass(exact=True)
        with graph.watched(self._contribute, self._flow_in, self._arrived):
            self._go(exact, [loss], None, retain=bool(from_loss))
            for branch in from_loss:
                difference = self._metric == "gradient"
                candidate = _Pass(difference=difference, dropped=branch)
                self._go(candidate, [loss], [torch.zeros_like(loss)] if difference else None, retain=True)
                self._finish(candidate)
                self._found[branch] = candidate
                self._on_branch()
        self._finish(exact)
        return {branch: self._value(branch, exact) for branch in graph.runs}

    def _check_memory(self) -> None:
        """Before any backward: compiled code would read whatever is there."""
        values = (value for record in self._records for value in record.inputs if type(value) in (Tensor, Parameter))
        if any(value.numel() and not value.untyped_storage().nbytes() for value in values):
            raise RuntimeError(
                "The memory of parameters was freed after the forward, as fully_shard does, but a calibration runs "
                "backwards of its own. Calibrate inside of dropbp_fx.distributed.gathered_parameters(model)."
            )

    @property
    def branches(self) -> frozenset[int]:
        """The branches that the forward ran."""
        return frozenset(branch for record in self._records for branch in record.branches)

    def restore(self) -> None:
        """Undo what the forward wrote into buffers."""
        with torch.no_grad():
            for original, before in self._written.values():
                original.copy_(before)

    def _go(self, current: _Pass, outputs: Any, tangents: Any, *, retain: bool) -> None:
        assert self._graph is not None
        self._passes.append(current)
        try:
            torch.autograd.grad(
                outputs, [self.probe, *self._graph.outer_leaves], tangents, retain_graph=retain, allow_unused=True
            )
        finally:
            self._passes.pop()

    def backward(self, record: RegionRecord, tangents: Sequence[Tensor | None]) -> Gradients:
        """What an isolated region does with the gradients that arrive at it."""
        if self._graph is None or not self._passes:
            raise RuntimeError(
                "step() ran a backward itself, by loss.backward() or torch.autograd.grad(), but calibrate() runs the "
                "backwards of a calibration. Return the loss from step() as the model computed it."
            )
        graph, current = self._graph, self._passes[-1]
        if current.dropped in record.branches:
            gradients = self._dropping(record, record.branches.index(current.dropped), tangents, current.difference)
        else:
            gradients = record.gradients(tangents, retain=True)
        if current.exact:
            self._arrived(graph.node_of(record))
            self._at_start[id(record)] = tangents
            for label, branch in enumerate(record.branches):
                if graph.is_all_below(branch, self._metric):
                    self._from_here(record, branch, label, tangents, gradients)
        for k, gradient in zip(record.wanted, gradients, strict=True):
            if k in record.weights and gradient is not None:
                self._contribute(record.weights[k], gradient)
        if current.exact:
            for k, gradient in zip(record.wanted, gradients, strict=True):
                if k in record.sources and gradient is not None:
                    self._flow_in(record.sources[k].node, record.sources[k].output_nr, gradient)
            if not graph.has_fallbacks(self._metric):
                del self._at_start[id(record)]
                record.inputs, record.edges = [], ()
        return [None if k in record.weights else gradient for k, gradient in zip(record.wanted, gradients, strict=True)]

    def _from_here(
        self, record: RegionRecord, branch: int, label: int, tangents: Sequence[Tensor | None], exact: Gradients
    ) -> None:
        """Measure ``branch`` by a backward that sets out from the inputs of its region."""
        assert self._graph is not None
        candidate = _Pass(difference=self._metric == "gradient")
        left = record.gradients_without(label, tangents, self._random[id(record)].rerun)
        if candidate.difference:
            left = [_minus(g, without) for g, without in zip(exact, left, strict=True)]
        else:
            candidate.sums.update(self._passes[-1].sums)  # what has come in from above stays as it is
        self._passes.append(candidate)
        try:
            for k, gradient in zip(record.wanted, left, strict=True):
                if k in record.weights and gradient is not None:
                    self._contribute(record.weights[k], gradient)
        finally:
            self._passes.pop()
        onward = [
            (record.sources[k], gradient)
            for k, gradient in zip(record.wanted, left, strict=True)
            if k in record.sources and gradient is not None
        ]
        if not candidate.difference:
            onward += [
                (torch.autograd.graph.GradientEdge(node, number), self._inflow[id(node), number])
                for node, number in self._graph.side_edges(branch)
                if (id(node), number) in self._inflow
            ]
        if onward:
            edges, carried = zip(*onward, strict=True)
            self._go(candidate, edges, carried, retain=True)
        self._finish(candidate)
        self._found[branch] = candidate
        self._on_branch()

    def _dropping(
        self, record: RegionRecord, label: int, tangents: Sequence[Tensor | None], difference: bool
    ) -> Gradients:
        """The gradients below a branch that is dropped here and elsewhere, or what they differ by from the exact ones."""
        rerun = self._random[id(record)].rerun
        if not difference:
            return record.gradients_without(label, tangents, rerun)
        exact = self._at_start[id(record)]
        left = [_minus(whole, lost) for whole, lost in zip(exact, tangents, strict=True)]
        return [
            _minus(g, without)
            for g, without in zip(
                record.gradients(exact, retain=True), record.gradients_without(label, left, rerun), strict=True
            )
        ]

    def _contribute(self, leaf: Tensor, gradient: Tensor) -> None:
        """Take note of a gradient that one use of ``leaf`` contributes to its gradient."""
        current, key = self._passes[-1], id(leaf)
        assert self._graph is not None
        if self._graph.uses[key] > 1:
            before = current.sums.get(key)
            current.sums[key] = gradient.detach().clone() if before is None else before + gradient
        else:
            current.squares[key] = squared_norm(gradient)

    def _flow_in(self, node: Any, number: int, gradient: Tensor) -> None:
        """Take note of a gradient that the exact backward sends to a node that several others send some to."""
        assert self._graph is not None
        if self._passes[-1].exact and self._graph.has_several_users(node):
            before = self._inflow.get((id(node), number))
            self._inflow[id(node), number] = gradient if before is None else before + gradient

    def _arrived(self, node: Any) -> None:
        """The exact backward has come to ``node``: nothing is pending for it any more."""
        if self._passes[-1].exact:
            for key in [key for key in self._inflow if key[0] == id(node)]:
                del self._inflow[key]

    @staticmethod
    def _finish(finished: _Pass) -> None:
        finished.squares.update({key: squared_norm(total) for key, total in finished.sums.items()})
        finished.sums.clear()

    def _value(self, branch: int, exact: _Pass) -> float:
        assert self._graph is not None
        found = self._found.get(branch, _Pass()).squares
        keys = self._graph.affected(branch)
        if self._metric == "gradient":
            return math.fsum(float(found[key]) for key in keys if key in found)
        return math.fsum(
            (math.sqrt(float(exact.squares.get(key, 0.0))) - math.sqrt(float(found.get(key, 0.0)))) ** 2 for key in keys
        )


def calibrate(
    step: Callable[[], Tensor],
    during: Callable[[Calibration], contextlib.AbstractContextManager[None]],
    metric: Metric,
    batches: int,
    on_batch: Callable[[dict[int, float]], object],
    progress: bool,
) -> None:
    """Measure the branches on ``batches`` calls of ``step``, leaving random streams and buffers as they were.

    Args:
        step: runs a forward and returns its loss.
        during: a context within which the backend's graphs run under a calibration.
        metric: what is measured.
        batches: how often.
        on_batch: gets the sensitivities by branch after each step.
        progress: show a bar, if tqdm is installed and there is a terminal.

    Raises:
        TypeError: ``step`` returned something else than a real scalar tensor.
        ValueError: its loss requires no gradient, or no residual branch ran in it.
        RuntimeError: ``step`` ran a backward itself.
    """
    with random_streams_kept(), _progress_bar(progress) as bar:
        for batch in range(batches):
            calibration = Calibration(metric, bar.update)
            try:
                with during(calibration), torch.enable_grad():
                    loss = step()
                    _check_loss(loss)
                    if not calibration.branches:
                        raise ValueError(
                            "No residual branch ran with gradients in step(). Call the compiled model in it, in training "
                            "mode (model.train()), and outside of torch.no_grad()."
                        )
                    if not batch:
                        bar.reset(batches * len(calibration.branches))
                    found = calibration.measure(loss)
            finally:
                calibration.restore()
            on_batch(found)


def check_call(step: object, progress_bar: object) -> None:
    """Refuse a step that cannot be called, and what is no choice of a progress bar.

    Raises:
        TypeError: what is wrong, and what would do.
    """
    if not callable(step):
        raise TypeError(f"step must be a function that runs a forward and returns its loss, not {shown(step)}.")
    if not takes(step):
        raise TypeError(
            f"step must be a function that is called without arguments, but {shown(step)} takes some: pass "
            "lambda: loss_of(batch), say."
        )
    if not isinstance(progress_bar, bool):
        raise TypeError(f"progress_bar must be True or False, not {shown(progress_bar)}.")


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else shown(loss)
        raise TypeError(f"step() must return the loss, a tensor of one element, not {shape}.")
    if not loss.is_floating_point():
        raise TypeError(f"step() must return a loss of real numbers, not of {loss.dtype}.")
    if not loss.requires_grad:
        raise ValueError(
            "The loss that step() returned requires no gradient. Return it as the model computed it: not detached, and with "
            "something trainable below it. The backward is run by calibrate(), not by step()."
        )


class _NoBar:
    def update(self) -> None:
        pass

    def reset(self, total: int) -> None:
        pass


@contextlib.contextmanager
def _progress_bar(wanted: bool) -> Iterator[Any]:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        wanted = False
    if not wanted:
        yield _NoBar()
        return
    with tqdm(desc="sensitivity", unit="branch", disable=None, leave=False) as bar:
        yield bar


def _minus(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if right is None:
        return left
    return -right if left is None else left - right
