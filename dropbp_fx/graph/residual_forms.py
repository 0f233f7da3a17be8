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
``x * (1 - g) + h * g``                                                             scales the stream as well
``A @ streams + h[:, None] * beta``    the streams                                  ``h`` alone: ``A`` and
(hyper-connections)                                                                 ``beta`` scale the streams
=====================================  ===========================================  ============================

Products in sums are taken apart in :mod:`dropbp_fx.graph.mixes`. In both, nodes are looked at by themselves; whether a
summand is a branch is for :mod:`dropbp_fx.graph.branches` to say.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from dropbp_fx.graph.values import example_value

ADDITIONS: frozenset[Any] = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})
ADDITIONS |= {"__add__", "__radd__", "__iadd__"}
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
MULTIPLICATIONS: frozenset[Any] = frozenset({operator.mul, operator.imul, torch.mul, torch.multiply})
MULTIPLICATIONS |= {"mul", "mul_", "multiply", "__mul__", "__rmul__"}
_SCALES = frozenset(
    {*_VIEWS, *MULTIPLICATIONS, operator.truediv, torch.div, "div", F.dropout, F.dropout1d, F.dropout2d}
)


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
    if node.target in ADDITIONS or node.target in _SUBTRACTIONS:
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


def _sum_of_two(node: fx.Node) -> Form | None:
    operands = operands_of(node, "input", "other")
    if len(operands) != 2 or not any(isinstance(operand, fx.Node) for operand in operands):
        return None
    if not all(isinstance(operand, (fx.Node, int, float)) for operand in operands):
        return None
    terms = tuple(Term((operand,), node) for operand in operands if isinstance(operand, fx.Node))
    return Form(terms, difference=node.target in _SUBTRACTIONS and len(terms) == 2)


def _stacked_sum(node: fx.Node) -> Form | None:
    """``torch.stack([x, h], dim).sum(dim)``: the tensors stacked are the summands."""
    operands = operands_of(node, "input")
    stack = operands[0] if operands else None
    if not isinstance(stack, fx.Node) or stack.target is not torch.stack or len(stack.users) != 1:
        return None
    stacked, *dims = operands_of(stack, "tensors", "dim")
    over = [*operands[1:], *(node.kwargs[name] for name in ("dim", "axis") if name in node.kwargs)]
    over = [*over[0]] if len(over) == 1 and isinstance(over[0], (list, tuple)) else over
    value = example_value(stack)
    if len(over) != 1 or not isinstance(value, torch.Tensor) or set(node.kwargs) - {"input", "dim", "axis"}:
        return None
    along = dims[0] if dims else 0
    if not isinstance(over[0], int) or not isinstance(along, int) or (over[0] - along) % value.ndim:
        return None
    if not isinstance(stacked, (list, tuple)) or not all(isinstance(item, fx.Node) for item in stacked):
        return None
    return Form(tuple(Term((item,), stack) for item in stacked))


def _added_product(node: fx.Node) -> Form | None:
    names = {"addcmul": ("tensor1", "tensor2"), "addmm": ("mat1", "mat2")}.get(name_of(node), ("batch1", "batch2"))
    operands = operands_of(node, "input", *names)
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
        operands = operands_of(node, "input", "indices", "values", "accumulate")
        if len(operands) != 4 or operands[3] is not True:
            return None
        stream, _, source, _ = operands
    else:
        last = "source" if name_of(node) == "index_add" else "src"
        operands = operands_of(node, "input", "dim", "index", last)
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
    operands = operands_of(node, "input", "end", "weight")
    if len(operands) != 3 or not all(isinstance(operand, fx.Node) for operand in operands[:2]):
        return None
    if operands[2] in operands[:2]:
        return None
    return Form(tuple(Term((operand,), node, plain=False) for operand in operands[:2]), opens=False)


def operands_of(node: fx.Node, *names: str) -> list[Any]:
    """A node's arguments by position, those given by one of ``names`` among them."""
    return [*node.args, *(node.kwargs[name] for name in names[len(node.args) :] if name in node.kwargs)]


def name_of(node: fx.Node) -> str:
    """What a node calls, in place or not."""
    return str(node.target if node.op == "call_method" else getattr(node.target, "__name__", "")).rstrip("_")


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
    return isinstance(node.args[0], fx.Node) and isinstance(example_value(node.args[0]), torch.Tensor)


def is_fused(node: fx.Node) -> bool:
    """Whether a node is a sum that multiplies as it adds."""
    form = form_of(node)
    return form is not None and form.fused
