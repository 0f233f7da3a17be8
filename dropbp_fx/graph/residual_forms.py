"""The forms in which a residual branch is added to its stream: for a node, what is summed and what of it may be gated.

=====================================  ===========================================  ============================
form                                   the stream                                   what is detached
=====================================  ===========================================  ============================
``x + h``, ``x - h``, ``alpha=``,      either                                       the other; a scale, a bias
``sum([x, h])``, ``stack(...).sum()``                                               and a layer scale belong to it
``addcmul(x, a, b)``, ``addmm``,       ``x``                                        the product: all its factors
``baddbmm``
``index_add``, ``scatter_add``,        ``x``                                        what is put into it
``index_put(accumulate=True)``
``lerp(x, h, w)``,                     either                                       ``h`` alone: ``w`` or ``g``
``x * (1 - g) + h * g``                                                             weighs the stream as well
``A @ streams + h[:, None] * beta``    the streams                                  ``h`` alone: ``A`` and
(hyper-connections)                                                                 ``beta`` weigh the streams
=====================================  ===========================================  ============================

Here nodes are looked at by themselves; whether a summand is a branch is for :mod:`dropbp_fx.graph.branches` to say.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from dropbp_fx import _torch

_ADDITIONS: frozenset[Any] = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})
_ADDITIONS |= {"__add__", "__radd__", "__iadd__"}
_SUBTRACTIONS: frozenset[Any] = frozenset({operator.sub, operator.isub, torch.sub, torch.subtract, torch.rsub})
_SUBTRACTIONS |= {"sub", "sub_", "subtract", "subtract_", "__sub__", "__rsub__", "__isub__"}
_STACKED_SUMS: frozenset[Any] = frozenset({torch.sum, torch.mean, "sum", "mean"})
_PRODUCTS_ADDED: frozenset[Any] = frozenset({torch.addcmul, torch.addmm, torch.baddbmm, torch.addbmm})
_PRODUCTS_ADDED |= {"addcmul", "addcmul_", "addmm", "addmm_", "baddbmm", "baddbmm_", "addbmm", "addbmm_"}
_PUT_INTO: frozenset[Any] = frozenset({torch.index_add, torch.scatter_add})
_PUT_INTO |= {"index_add", "index_add_", "scatter_add", "scatter_add_"}
_PUT_AT: frozenset[Any] = frozenset({torch.index_put, "index_put", "index_put_"})
_MIXES: frozenset[Any] = frozenset({torch.lerp, "lerp", "lerp_"})

#: In-place forms and what computes the same out of place, from the same arguments.
OUT_OF_PLACE: Mapping[Any, Callable[..., Any]] = {
    operator.iadd: torch.add,
    operator.isub: torch.sub,
    "add_": torch.add,
    "__iadd__": torch.add,
    "sub_": torch.sub,
    "subtract_": torch.sub,
    "__isub__": torch.sub,
    "addcmul_": torch.addcmul,
    "addmm_": torch.addmm,
    "baddbmm_": torch.baddbmm,
    "addbmm_": torch.addbmm,
    "index_add_": torch.index_add,
    "scatter_add_": torch.scatter_add,
    "index_put_": torch.index_put,
    "lerp_": torch.lerp,
}

_VIEWS: frozenset[Any] = frozenset({torch.reshape, torch.transpose, torch.permute, torch.flatten, torch.unflatten})
_VIEWS |= {torch.squeeze, torch.unsqueeze, torch.clone}
_VIEWS |= {"view", "reshape", "transpose", "permute", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous"}
_VIEWS |= {"to", "float", "half", "bfloat16", "double", "type_as", "type", "clone", "mT", "T", "movedim", "swapaxes"}
_MULTIPLICATIONS: frozenset[Any] = frozenset({operator.mul, operator.imul, torch.mul, torch.multiply})
_MULTIPLICATIONS |= {"mul", "mul_", "multiply", "__mul__", "__rmul__"}
_SCALES = frozenset(
    {*_VIEWS, *_MULTIPLICATIONS, operator.truediv, torch.div, "div", F.dropout, F.dropout1d, F.dropout2d}
)
_MATRIX_PRODUCTS: frozenset[Any] = frozenset({operator.matmul, torch.matmul, torch.bmm, torch.einsum})
_MATRIX_PRODUCTS |= {"matmul", "__matmul__", "bmm"}
_EXPANSIONS: frozenset[Any] = frozenset({"expand", "expand_as", "repeat", "broadcast_to", torch.broadcast_to})


@dataclasses.dataclass(frozen=True)
class Term:
    """A summand.

    Attributes:
        values: the node whose value it is, or all factors of a product that has no node of its own.
        consumer: the node that takes them.
        may_be_stream: whether it may be what branches are added to.
        may_be_branch: whether it may be what is added.
        plain: whether it goes into the sum as it is, so that no other way of reading the sum is as good.
    """

    values: tuple[fx.Node, ...]
    consumer: fx.Node
    may_be_stream: bool = True
    may_be_branch: bool = True
    plain: bool = True

    @property
    def value(self) -> fx.Node:
        return self.values[-1]

    @property
    def edges(self) -> tuple[tuple[fx.Node, fx.Node], ...]:
        return tuple((value, self.consumer) for value in dict.fromkeys(self.values))


@dataclasses.dataclass(frozen=True)
class Form:
    """A node as a sum.

    Attributes:
        terms: its summands, numbers left out.
        opens: whether a summand that is itself a sum may be read as its own summands.
        fused: whether the node multiplies as it adds.
        difference: whether one summand is taken from another.
    """

    terms: tuple[Term, ...]
    opens: bool = True
    fused: bool = False
    difference: bool = False


def form_of(node: fx.Node) -> Form | None:
    """``node`` as a sum, ``None`` if it is none."""
    if node.op not in ("call_function", "call_method") or node.kwargs.get("out") is not None:
        return None
    form: Form | None = None
    if node.target in _ADDITIONS or node.target in _SUBTRACTIONS:
        form = _sum_of_two(node)
    elif node.target in _STACKED_SUMS:
        form = _stacked_sum(node)
    elif node.target in _PRODUCTS_ADDED:
        form = _added_product(node)
    elif node.target in _PUT_INTO or node.target in _PUT_AT:
        form = _put_into(node)
    elif node.target in _MIXES:
        form = _mix(node)
    if form is None:
        return None
    values = [value for term in form.terms for value in dict.fromkeys(term.values)]
    return form if len(set(values)) == len(values) else None  # a gate could not tell the uses apart


def is_inplace(node: fx.Node) -> bool:
    """Whether ``node`` is a sum that is written into its first operand."""
    return node.target in OUT_OF_PLACE and form_of(node) is not None


def split_list_adds(graph: fx.Graph) -> bool:
    """Rewrite ``torch._foreach_add`` of two lists as one add for each pair, in place; numerics are preserved.

    Returns:
        Whether there was one.
    """
    changed = False
    for node in list(graph.nodes):
        inplace = node.target is _torch.FOREACH_ADD_
        if node.op != "call_function" or not (inplace or node.target is _torch.FOREACH_ADD) or len(node.args) != 2:
            continue
        lefts, rights = node.args
        if not isinstance(lefts, (list, tuple)) or not isinstance(rights, (list, tuple)):
            continue
        operands = [*lefts, *rights]
        items = [user for user in node.users if user.target is operator.getitem and isinstance(user.args[1], int)]
        if len(items) < len(node.users) or len(set(operands)) < len(operands):
            continue
        if not all(isinstance(operand, fx.Node) for operand in operands):
            continue
        sums: list[fx.Node] = []
        for left, right in zip(lefts, rights, strict=True):
            with graph.inserting_before(node):
                arguments = ((left, right), dict(node.kwargs))
                sums.append(
                    graph.call_method("add_", *arguments) if inplace else graph.call_function(torch.add, *arguments)
                )
            sums[-1].meta = {**node.meta, "example_value": _example(left)}
        for item in items:
            made = sums[item.args[1]]
            made.meta = dict(item.meta)
            item.replace_all_uses_with(made)
            graph.erase_node(item)
        graph.erase_node(node)
        changed = True
    return changed


def _sum_of_two(node: fx.Node) -> Form | None:
    operands = _operands(node, "input", "other")
    if len(operands) != 2 or not any(isinstance(operand, fx.Node) for operand in operands):
        return None
    if not all(isinstance(operand, (fx.Node, int, float)) for operand in operands):
        return None
    terms = tuple(Term((operand,), node) for operand in operands if isinstance(operand, fx.Node))
    return Form(terms, difference=node.target in _SUBTRACTIONS and len(terms) == 2)


def _stacked_sum(node: fx.Node) -> Form | None:
    """``torch.stack([x, h], dim).sum(dim)``: the tensors stacked are the summands."""
    operands = _operands(node, "input")
    stack = operands[0] if operands else None
    if not isinstance(stack, fx.Node) or stack.target is not torch.stack or len(stack.users) != 1:
        return None
    stacked, *dims = _operands(stack, "tensors", "dim")
    over = [*operands[1:], *(node.kwargs[name] for name in ("dim", "axis") if name in node.kwargs)]
    over = [*over[0]] if len(over) == 1 and isinstance(over[0], (list, tuple)) else over
    value = _example(stack)
    if len(over) != 1 or not isinstance(value, torch.Tensor) or set(node.kwargs) - {"input", "dim", "axis"}:
        return None
    along = dims[0] if dims else 0
    if not isinstance(over[0], int) or not isinstance(along, int) or (over[0] - along) % value.ndim:
        return None
    if not isinstance(stacked, (list, tuple)) or not all(isinstance(item, fx.Node) for item in stacked):
        return None
    return Form(tuple(Term((item,), stack) for item in stacked))


def _added_product(node: fx.Node) -> Form | None:
    names = {"addcmul": ("tensor1", "tensor2"), "addmm": ("mat1", "mat2")}.get(_name(node), ("batch1", "batch2"))
    operands = _operands(node, "input", *names)
    if len(operands) != 3 or not all(isinstance(operand, fx.Node) for operand in operands):
        return None  # the older signatures take numbers between the tensors
    stream, *factors = operands
    return Form(
        (
            Term((stream,), node, may_be_branch=False, plain=False),
            Term(tuple(factors), node, may_be_stream=False, plain=False),
        ),
        fused=True,
    )


def _put_into(node: fx.Node) -> Form | None:
    if node.target in _PUT_AT:
        operands = _operands(node, "input", "indices", "values", "accumulate")
        if len(operands) != 4 or operands[3] is not True:
            return None
        stream, _, source, _ = operands
    else:
        last = "source" if _name(node) == "index_add" else "src"
        operands = _operands(node, "input", "dim", "index", last)
        if len(operands) != 4:
            return None
        stream, _, _, source = operands
    if not isinstance(stream, fx.Node) or not isinstance(source, fx.Node):
        return None
    return Form(
        (
            Term((stream,), node, may_be_branch=False, plain=False),
            Term((source,), node, may_be_stream=False, plain=False),
        )
    )


def _mix(node: fx.Node) -> Form | None:
    operands = _operands(node, "input", "end", "weight")
    if len(operands) != 3 or not all(isinstance(operand, fx.Node) for operand in operands[:2]):
        return None
    if operands[2] in operands[:2]:
        return None
    return Form(tuple(Term((operand,), node, plain=False) for operand in operands[:2]), opens=False)


def _operands(node: fx.Node, *names: str) -> list[Any]:
    return [*node.args, *(node.kwargs[name] for name in names[len(node.args) :] if name in node.kwargs)]


def _name(node: fx.Node) -> str:
    return str(node.target if node.op == "call_method" else getattr(node.target, "__name__", "")).rstrip("_")


def _example(node: fx.Node) -> Any:
    return node.meta.get("example_value")


def is_view(node: fx.Node) -> bool:
    """Whether a node only casts its operand or gives it another shape."""
    if node.target is getattr and len(node.args) == 2:
        return node.args[1] in _VIEWS
    return node.op in ("call_function", "call_method") and node.target in _VIEWS


def scales_only(node: fx.Node) -> bool:
    """Whether a node only scales its operand, leaves out parts of it by chance, casts it or gives it another shape."""
    return node.op in ("call_function", "call_method") and node.target in _SCALES


def is_piece(node: fx.Node) -> bool:
    """Whether a node is a part of a tensor."""
    if node.op == "call_method":
        return node.target in ("narrow", "select", "index_select")
    if node.target not in (operator.getitem, torch.narrow, torch.select, torch.index_select):
        return False
    return isinstance(node.args[0], fx.Node) and isinstance(_example(node.args[0]), torch.Tensor)


def factors(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two factors of an elementwise product of nodes."""
    if node.op not in ("call_function", "call_method") or node.target not in _MULTIPLICATIONS:
        return None
    operands = _operands(node, "input", "other")
    if len(operands) != 2 or operands[0] is operands[1]:
        return None
    left, right = operands
    return (left, right) if isinstance(left, fx.Node) and isinstance(right, fx.Node) else None


def gated_mix(stream: fx.Node, other: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """What is mixed where ``stream + other`` is ``x * g + h * (1 - g)``, in any order: ``x`` and ``h``."""
    left, right = factors(stream), factors(other)
    if left is None or right is None:
        return None
    for kept, gate in (left, left[::-1]):
        for added, rest in (right, right[::-1]):
            if _are_complements(gate, rest):
                return kept, added
    return None


def _are_complements(gate: fx.Node, rest: fx.Node) -> bool:
    return any(
        taken is not None and _same_value(taken, whole)
        for whole, taken in ((gate, _one_minus(rest)), (rest, _one_minus(gate)))
    )


def _one_minus(node: fx.Node) -> fx.Node | None:
    """``g`` where ``node`` is ``1 - g``."""
    node = _without_views(node)
    operands = _operands(node, "input", "other")
    if node.target in (torch.rsub, "rsub", "__rsub__"):
        operands = operands[::-1]
    elif node.target not in (operator.sub, torch.sub):
        return None
    if len(operands) != 2 or "alpha" in node.kwargs or operands[0] != 1:
        return None
    return operands[1] if isinstance(operands[1], fx.Node) else None


def _without_views(node: fx.Node) -> fx.Node:
    while is_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _same_value(left: Any, right: Any, depth: int = 6) -> bool:
    """Whether two nodes are one, or compute the same from the same, views aside: ``sigmoid(g)`` is often written twice."""
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return type(left) is type(right) and bool(left == right)
    left, right = _without_views(left), _without_views(right)
    if left is right:
        return True
    if (
        depth == 0
        or (left.op, left.target) != (right.op, right.target)
        or left.op not in ("call_function", "call_method")
    ):
        return False
    if left.kwargs or right.kwargs or len(left.args) != len(right.args) or "dropout" in _name(left):
        return False
    return all(_same_value(a, b, depth - 1) for a, b in zip(left.args, right.args, strict=True))


def expanded(term: Term) -> Iterator[Term]:
    """What is repeated, each time with a weight of its own, to make ``term``: ``h`` of ``h.unsqueeze(-2) * beta``.

    The likelier factor comes first. Nothing where ``term`` is no such product, or is used by others too.
    """
    value = term.value
    above = term.consumer
    while is_view(value) and len(value.users) == 1 and isinstance(value.args[0], fx.Node):
        if _is_expanded(value, above):
            break
        value, above = value.args[0], value
    if _is_expanded(value, above):
        yield Term((value,), above)
        return
    if len(value.users) != 1:
        return
    if value.target in _EXPANSIONS and isinstance(value.args[0], fx.Node):
        yield Term((value.args[0],), value)
        return
    pair = factors(value) or _outer_factors(value)
    if pair is None:
        return
    for factor in sorted(pair, key=lambda node: -_elements(node)):
        if _elements(factor) < _elements(value):
            yield Term((factor,), value)


def _is_expanded(value: fx.Node, consumer: fx.Node) -> bool:
    """Whether ``consumer`` sums, and broadcasts ``value``."""
    return consumer.target in _ADDITIONS and _elements(value) < _elements(consumer)


def _outer_factors(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The operands of a matrix product, or an einsum, that sums over nothing."""
    if node.op not in ("call_function", "call_method") or node.target not in _MATRIX_PRODUCTS:
        return None
    operands = node.all_input_nodes
    if len(operands) != 2:
        return None
    left, right = operands
    if node.target is torch.einsum:
        equation = str(node.args[0]).replace(" ", "")
        inputs, _, output = equation.partition("->")
        return (left, right) if output and set(inputs) - {","} <= set(output) else None
    value = _example(left)
    return (left, right) if isinstance(value, torch.Tensor) and value.shape[-1] == 1 else None


def mixed(node: fx.Node) -> tuple[fx.Node, ...]:
    """The operands of a product that may mix streams: of a matrix product, or of a product summed over a dimension."""
    if node.op not in ("call_function", "call_method"):
        return ()
    if node.target in _MATRIX_PRODUCTS:
        return tuple(node.all_input_nodes)
    if node.target in (torch.sum, "sum") and node.args and isinstance(node.args[0], fx.Node):
        return factors(node.args[0]) or ()
    return ()


def _elements(node: fx.Node) -> int:
    value = _example(node)
    if not isinstance(value, torch.Tensor):
        return 0
    count = 1
    for size in value.shape:  # a symbol counts as the traced example's, which installs no guard
        count *= int(size.node.hint or 1) if isinstance(size, torch.SymInt) else int(size)
    return count
