"""Which inputs of a region receive a gradient from which outputs, for any pattern.

The answer is read off autograd itself: the region runs once on fake tensors with its gates in place, and the autograd
graph behind each output is walked down to the inputs. An input that no kept path reaches gets ``None``, exactly as in an
eager model whose branch is detached.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from dropbp_fx import _torch
from dropbp_fx.graph.gate import drops, gate_label_of
from dropbp_fx.graph.hooks import is_hooked


@dataclasses.dataclass(frozen=True)
class _AutogradNode:
    """One autograd node: the gate it is, the input it accumulates into, the nodes it hands its gradient on to unchanged, and
    whether a hook of the model's changes that gradient first.
    """

    next: tuple[int, ...]
    label: int | None
    leaf: int | None
    unchanged: frozenset[int]
    hooked: bool


class GradientFlow:
    """The autograd graph of one region, reduced to what decides which gradients exist.

    Attributes:
        differentiable: outputs that require a gradient when every input that can does.
        mutated: inputs whose memory the region writes to (running statistics of a normalisation).
    """

    def __init__(
        self,
        nodes: Sequence[_AutogradNode],
        roots: Sequence[int | None],
        identity: frozenset[tuple[int, int]],
        mutated: frozenset[int],
    ) -> None:
        self.mutated = mutated
        self._nodes = nodes
        self._roots = roots
        self._identity = identity
        self.differentiable = frozenset(j for j, root in enumerate(roots) if root is not None)
        self.sources = functools.lru_cache(maxsize=None)(self._sources)
        self.detached_sources = functools.lru_cache(maxsize=None)(self._detached_sources)
        self.passes_through = functools.lru_cache(maxsize=None)(self._passes_through)

    def _sources(self, output: int, dropped: frozenset[int]) -> frozenset[int]:
        """The inputs that receive a gradient from ``output`` when the gates labelled ``dropped`` are."""
        root = self._roots[output]
        return frozenset() if root is None else self._leaves_below(root, dropped)

    @property
    def hands_out(self) -> bool:
        """Whether some value leaves a branch for the graph's outputs."""
        return any(node.label is not None and node.label < 0 for node in self._nodes)

    def _detached_sources(self, output: int, dropped: frozenset[int]) -> frozenset[int]:
        """The same where the branches' outputs alone are detached, and not what leaves them for the graph's outputs."""
        root = self._roots[output]
        return frozenset() if root is None else self._leaves_below(root, dropped, outputs_only=True)

    def _passes_through(self, output: int, dropped: frozenset[int]) -> int | None:
        """The one input that receives ``output``'s gradient unchanged and alone, ``None`` if there is no such input."""
        current = self._roots[output]
        while current is not None:
            node = self._nodes[current]
            if node.leaf is not None:
                return node.leaf if (output, node.leaf) in self._identity else None
            kept = [following for following in node.next if self._leaves_below(following, dropped)]
            if node.hooked or len(kept) != 1 or not (node.label is not None or kept[0] in node.unchanged):
                return None
            (current,) = kept
        return None

    def _leaves_below(self, index: int, dropped: frozenset[int], *, outputs_only: bool = False) -> frozenset[int]:
        """The inputs that a gradient at autograd node ``index`` reaches."""
        found: set[int] = set()
        seen = {index}
        pending = [index]
        while pending:
            node = self._nodes[pending.pop()]
            if node.label is not None and (node.label in dropped if outputs_only else drops(dropped, node.label)):
                continue
            if node.leaf is not None:
                found.add(node.leaf)
            for following in node.next:
                if following not in seen:
                    seen.add(following)
                    pending.append(following)
        return frozenset(found)

    @classmethod
    def trace(cls, gm: fx.GraphModule, inputs: Sequence[Any]) -> GradientFlow:
        """Run ``gm`` on fake ``inputs`` (leaves; those that can require a gradient do) and read its autograd graph."""
        leaves = {id(value): index for index, value in enumerate(inputs) if isinstance(value, torch.Tensor)}
        versions = [_version(value) for value in inputs]
        with torch.enable_grad():
            outputs = gm(*inputs)
        mutated = {k for k, value in enumerate(inputs) if _version(value) != versions[k]}
        mutated |= _running_statistics(gm)
        index_of: dict[Any, int] = {}
        ordered: list[Any] = []

        def number(grad_fn: Any) -> int:
            if grad_fn not in index_of:
                index_of[grad_fn] = len(ordered)
                ordered.append(grad_fn)
            return index_of[grad_fn]

        roots: list[int | None] = []
        input_leaf: list[int | None] = []
        for value in outputs:
            differentiable = isinstance(value, torch.Tensor) and value.requires_grad
            if differentiable and value.grad_fn is None:  # an input returned as it is
                roots.append(-1 - len(input_leaf))
                input_leaf.append(leaves.get(id(value)))
            else:
                roots.append(number(value.grad_fn) if differentiable else None)
        nodes: list[_AutogradNode] = []
        position = 0
        while position < len(ordered):
            grad_fn = ordered[position]
            position += 1
            variable = getattr(grad_fn, "variable", None)
            nodes.append(
                _AutogradNode(
                    next=tuple(number(following) for following, _ in grad_fn.next_functions if following is not None),
                    label=gate_label_of(grad_fn),
                    leaf=None if variable is None else leaves.get(id(variable)),
                    unchanged=frozenset(map(number, _handed_on_unchanged(grad_fn))),
                    hooked=is_hooked(grad_fn),
                )
            )
        nodes.extend(
            _AutogradNode(next=(), label=None, leaf=leaf, unchanged=frozenset(), hooked=False) for leaf in input_leaf
        )
        resolved = [len(ordered) + (-1 - root) if root is not None and root < 0 else root for root in roots]
        identity = frozenset(
            (j, k)
            for j, value in enumerate(outputs)
            for k, source in enumerate(inputs)
            if isinstance(value, torch.Tensor)
            and isinstance(source, torch.Tensor)
            and value.dtype == source.dtype
            and value.device == source.device
            and str(tuple(value.shape)) == str(tuple(source.shape))
        )
        return cls(nodes, resolved, identity, frozenset(mutated))


#: Sums that hand their gradient on to their first operand as it is, whatever scales the second.
_SUMS = frozenset({"AddBackward0", "SubBackward0", "AddcmulBackward0", "IndexAddBackward0", "ScatterAddBackward0"})


def _handed_on_unchanged(grad_fn: Any) -> list[Any]:
    """The autograd nodes below a sum that get its gradient as it is; one that broadcasts is told by the values' shapes."""
    if grad_fn.name() not in _SUMS:
        return []
    both = grad_fn.name() == "AddBackward0" and _torch.saved_alpha(grad_fn) == 1
    return [following for following, _ in grad_fn.next_functions[: 2 if both else 1] if following is not None]


def _version(value: Any) -> int:
    return _torch.version_of(value) if isinstance(value, torch.Tensor) and not value.is_inference() else 0


def _running_statistics(gm: fx.GraphModule) -> set[int]:
    """Inputs that normalisations read directly: they may write running statistics, and their schemas do not say so."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    return {
        k
        for k, placeholder in enumerate(placeholders)
        if any(getattr(user.target, "__name__", "") in ("batch_norm", "instance_norm") for user in placeholder.users)
    }
