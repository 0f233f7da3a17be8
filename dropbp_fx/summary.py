"""A backend's figures, and the few lines that a shell or a notebook shows of it."""

from __future__ import annotations

import dataclasses
import html

from dropbp_fx.config import BackendConfig
from dropbp_fx.policy.drop_policy import DropPolicy
from dropbp_fx.policy.patterns import pattern_name
from dropbp_fx.runtime.device_graphs import GraphMemory
from dropbp_fx.state import BackendState


@dataclasses.dataclass(frozen=True)
class BackendStats:
    """Figures of a backend so far.

    Attributes:
        forwards: training forwards, evaluation not counted: one for each time that a model with residual branches runs in
            training mode and something in it requires a gradient, whether or not any of it can be dropped, and however
            many graphs it is in.
        realised_rate: share of droppable (branch, forward) pairs that was dropped, pinned forwards included.
        realised_flops_rate: the same, branches weighted by the backward FLOPs that dropping them saves.
        attainable_rate: what the pattern makes of the rates in the long run, one trainable branch always being kept.
        graphs: graphs that Dynamo compiled, training and evaluation.
        unique_regions: regions with a structure of their own; equal layers count once.
        compiled_variants: compiled variants of regions.
        compile_seconds: time spent in the inner compiler.
        recorded_cuda_graphs: CUDA graphs recorded of regions' forwards and backwards.
    """

    forwards: int
    realised_rate: float
    realised_flops_rate: float
    attainable_rate: float
    graphs: int
    unique_regions: int
    compiled_variants: int
    compile_seconds: float
    recorded_cuda_graphs: int = 0

    @classmethod
    def of(cls, state: BackendState) -> BackendStats:
        """The figures of one backend."""
        sampler, counts = state.sampler, state.counts
        return cls(
            forwards=sampler.forwards,
            realised_rate=sampler.branches.realised_rate(),
            realised_flops_rate=sampler.branches.realised_flops_rate(),
            attainable_rate=sampler.rated.attainable_rate(),
            graphs=counts.graphs,
            unique_regions=counts.regions,
            compiled_variants=counts.variants,
            compile_seconds=counts.seconds,
            recorded_cuda_graphs=sum(memory.recorded for memory in state.graph_memory.values()),
        )


def as_text(config: BackendConfig, state: BackendState) -> str:
    """One readable block."""
    rows = _rows(config, state)
    width = max(map(len, rows))
    return "\n".join(["DropBPBackend", *(f"  {name:<{width}}  {value}" for name, value in rows.items())])


def as_html(config: BackendConfig, state: BackendState) -> str:
    """The same as a table."""
    cells = "".join(
        f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
        f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
        for name, value in _rows(config, state).items()
    )
    return f"<table><caption>DropBPBackend</caption>{cells}</table>"


def _rows(config: BackendConfig, state: BackendState) -> dict[str, str]:
    # Nothing here waits for a device or calls a function of the user's: debuggers show objects at any time.
    sampler, counts = state.sampler, state.counts
    branches = tuple(sampler.branches)
    droppable = sum(branch.droppable for branch in branches)
    return {
        "policy": policy_text(config.policy),
        "rate": f"{sampler.rated.rate:g} asked for, "
        + (
            f"{sampler.branches.realised_rate():.3g} realised in {_counted(sampler.forwards, 'training forward')}"
            if sampler.forwards
            else "no training forward yet"
        ),
        "progress": f"{sampler.rated.progress:g}",
        "branches": f"{len(branches)}, {droppable} of them droppable" if branches else "none before the first forward",
        "variants": f"{counts.variants} compiled in {counts.seconds:.1f} seconds, of "
        f"{_counted(counts.regions, 'region')} in {_counted(counts.graphs, 'graph')}",
        "compiler": config.inner if isinstance(config.inner, str) else "a pair of functions",
        "seed": str(config.seed),
    } | {f"graphs on {device}": _graphs_text(memory) for device, memory in state.graph_memory.items()}


def _graphs_text(memory: GraphMemory) -> str:
    """How many CUDA graphs there are, how much runs in them, and why the rest does not."""
    others = memory.run_without.total()
    if not memory.replayed + others:
        return "none recorded yet"
    share = memory.replayed / (memory.replayed + others)
    text = f"{memory.recorded} recorded, which ran {share:.1%} of the branches' forwards"
    return text if not others else f"{text}; most others: {memory.run_without.most_common(1)[0][0]}"


def policy_text(policy: DropPolicy) -> str:
    """Its name, and what of it is not as by default."""
    pattern = pattern_name(policy.resolved_pattern)
    schedule = policy.schedule if isinstance(policy.schedule, str) else type(policy.schedule).__name__
    own = [f"pattern {pattern}", f"schedule {schedule}"]
    for field in dataclasses.fields(policy):
        value = getattr(policy, field.name)
        if field.name not in ("rate", "pattern", "schedule") and value != field.default:
            own.append(f"{field.name} {value}")
    return f"{policy.name or 'of its own'}: {', '.join(own)}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
