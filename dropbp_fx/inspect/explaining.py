"""``dropbp_fx.explain``: from a model, or a live backend, to an :class:`Explanation`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from torch import nn

from dropbp_fx import _torch
from dropbp_fx.backend import DropBPBackend
from dropbp_fx.captured import CapturedGraph
from dropbp_fx.entry import dropbp_backend
from dropbp_fx.graph.cost import branch_forward_flops, joint_cost
from dropbp_fx.inspect.capture import capture
from dropbp_fx.inspect.costs import CostModel
from dropbp_fx.inspect.explanation import Explanation
from dropbp_fx.inspect.figures import ExplainedBranch
from dropbp_fx.inspect.given import Given, captured_inputs, describe_given, given_arguments
from dropbp_fx.policy.branches import Branch
from dropbp_fx.rehearsal import Captures, Rehearsal, captures_of


def explain(
    model: nn.Module | DropBPBackend, *args: Any, backend: DropBPBackend | None = None, **kwargs: Any
) -> Explanation:
    """Say what would be dropped in a model and what that saves, before anything is compiled or run.

    Usage::

        explanation = dropbp_fx.explain(model, input_ids=ids, labels=ids)
        print(explanation)
        explanation.predict(0.5).relative_cost

    The model is traced on a copy whose tensors have no data, so a model that does not fit into memory can be explained
    (build it under ``torch.device("meta")`` or in a ``FakeTensorMode``), and a model that does is left as it is. A model
    in evaluation mode is explained as in training mode.

    Args:
        model: the model; or a backend whose model has run, to explain the graphs it has found.
        args: the arguments of the model's forward; tensors on the meta device will do.
        backend: explain the model for this backend's rate, granularity and inner compiler; it stays unused.
        kwargs: the keyword arguments of the model's forward.

    Raises:
        TypeError: ``model`` is neither a module nor a backend, or ``backend`` is no backend.
        ValueError: a backend that has not seen a model, or one with arguments.
        RuntimeError: the model cannot be traced on fake tensors.
    """
    if isinstance(model, DropBPBackend):
        if args or kwargs or backend is not None:
            raise ValueError(
                "explain() of a backend takes no further argument: it explains the graphs which that backend has found. To "
                "explain a model, pass the model and the arguments of its forward."
            )
        return _explain_live(model)
    if backend is not None and not isinstance(backend, DropBPBackend):
        raise TypeError(
            f"backend must be what dropbp_backend() returns, not {type(backend).__name__}; explain() takes its rate, "
            "granularity and inner compiler."
        )
    asked = backend if backend is not None else dropbp_backend()
    captures = capture(model, args, kwargs, lambda: Rehearsal(asked))
    parameters = list(model.parameters())
    return _explained(
        type(_torch.original_module(model)).__name__,
        captures,
        given=describe_given([model], given_arguments(model, args, kwargs), captures.policy, asked.rate),
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
    )


def _explain_live(backend: DropBPBackend) -> Explanation:
    captures = captures_of(backend)
    if not captures.graphs:
        raise ValueError(
            "This backend has not seen a training graph with residual branches, so there is nothing to explain. Run a "
            "training forward of the compiled model first, or pass the model to explain()."
        )
    given = describe_given(
        captures.models,
        captured_inputs(captures.graphs),
        captures.policy,
        backend.rate,
        forwards=backend.stats.forwards,
    )
    return _explained("backend", captures, given=given, parameters=None, trainable=None)


def _explained(
    model: str,
    captures: Captures,
    *,
    given: Given,
    parameters: int | None,
    trainable: int | None,
) -> Explanation:
    inner = captures.inner
    costs = CostModel(_torch.inductor_decompositions() if inner == "inductor" else None)
    table = {branch.index: branch for branch in captures.branches}
    measured = captures.sensitivity
    sensitivities = {} if measured is None else dict(zip(measured.names, measured.values, strict=True))
    explained: dict[int, ExplainedBranch] = {}
    for number, graph in enumerate(captures.graphs):
        for branch in _branches_of(number, graph, table, sensitivities, costs):
            known = explained.get(branch.index)
            if known is None or (branch.droppable and not known.droppable):
                explained[branch.index] = branch
    return Explanation(
        model=model,
        given=given,
        branches=[explained[index] for index in sorted(explained)],
        graphs=captures.graphs,
        costs=costs,
        granularity=captures.policy.granularity,
        inner=inner if isinstance(inner, str) else "custom",
        pattern=captures.policy.resolved_pattern,
        parameters=parameters,
        trainable_parameters=trainable,
        shortfall=captures.shortfall,
    )


def _branches_of(
    number: int, graph: CapturedGraph, table: dict[int, Branch], sensitivities: Mapping[str, float], costs: CostModel
) -> list[ExplainedBranch]:
    """Every branch of a graph. Branches of regions that share their code are measured once."""
    place = {
        branch: (position, label)
        for position, region in enumerate(graph.program.regions)
        for label, branch in enumerate(region.branches)
    }
    kept = graph.planner.decide(())
    figures: dict[Hashable, dict[str, int]] = {}
    explained: list[ExplainedBranch] = []
    number_of = {index: position for position, index in enumerate(graph.indices)}
    for index, facts in graph.facts.items():
        branch = table[index]
        region, measured = -1, dict.fromkeys(_FIGURES, 0)
        if index in number_of:
            region, label = place[number_of[index]]
            variants = graph.variants[region]
            alone = graph.planner.decide((number_of[index],))[region]
            key = (variants, label, kept[region].key, alone.key)
            if key not in figures:
                figures[key] = {
                    **_joint_figures(variants.joint, label),
                    "saved_bytes_kept": costs.saved_bytes(variants, kept[region].key),
                    "saved_bytes_dropped": costs.saved_bytes(variants, alone.key),
                }
            measured = figures[key]
        explained.append(
            ExplainedBranch(
                index=index,
                name=branch.name,
                layer=branch.layer,
                kind=facts.kind,
                graph=number,
                region=region,
                trainable=branch.trainable,
                droppable=index in number_of,
                parameters=facts.parameters,
                trainable_parameters=facts.trainable_parameters,
                rate=branch.rate,
                sensitivity=sensitivities.get(branch.name),
                **measured,
            )
        )
    return explained


_FIGURES = (
    *("forward_flops", "backward_flops", "saved_bytes_kept", "saved_bytes_dropped"),
    *("gradient_nodes", "gradient_nodes_pruned"),
)


def _joint_figures(joint: Any, label: int) -> dict[str, int]:
    if joint is None:
        return dict.fromkeys(("forward_flops", "backward_flops", "gradient_nodes", "gradient_nodes_pruned"), 0)
    kept, dropped = joint_cost(joint.graph), joint_cost(joint.graph, {label})
    return {
        "forward_flops": branch_forward_flops(joint, label),
        "backward_flops": kept.backward_flops - dropped.backward_flops,
        "gradient_nodes": kept.gradient_nodes,
        "gradient_nodes_pruned": kept.gradient_nodes - dropped.gradient_nodes,
    }
