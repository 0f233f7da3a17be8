"""Tell which nodes are sums that a stream could go through, and what they sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import fx

from dropbp_fx.graph.dataflow import Dataflow
from dropbp_fx.graph.residual_forms import Term, form_of, is_inplace
from dropbp_fx.graph.values import have_one_shape, is_activation


def is_sum(flow: Dataflow, node: fx.Node) -> bool:
    """Whether a node is a differentiable sum that is used, some summand of which could be a stream."""
    form, index = form_of(node), flow.position[node]
    if form is None or not flow.parents[index] or not flow.live[index] or not is_activation(node):
        return False
    if not all(is_activation(value, scalar=True) for term in form.terms for value in term.values):
        return False
    return any(term.may_be_stream and have_one_shape(term.value, node) for term in form.terms)


def is_residual_shaped(flow: Dataflow, node: fx.Node) -> bool:
    """Whether a node is a sum of activations of one shape."""
    form = form_of(node)
    if form is None or len(form.terms) < 2 or form.fused or not is_sum(flow, node):
        return False
    return all(have_one_shape(term.value, node) for term in form.terms)


def terms_of(flow: Dataflow, node: fx.Node, absorbed: set[fx.Node], plain: bool = True) -> Iterator[Term]:
    """The summands of a sum; sums used by nothing else are part of it."""
    form = form_of(node)
    for term in form.terms if form is not None else ():
        operand = term.value
        inner = form_of(operand) if form is not None and form.opens and len(term.values) == 1 else None
        if inner is not None and inner.opens and _may_open(flow, operand, node):
            absorbed.add(operand)
            yield from terms_of(flow, operand, absorbed, plain and term.plain)
        else:
            equal = all(have_one_shape(value, node) for value in term.values)
            yield dataclasses.replace(term, plain=plain and term.plain and equal)


def _may_open(flow: Dataflow, operand: fx.Node, total: fx.Node) -> bool:
    one_use = len(operand.users) == 1 and not is_inplace(operand)
    return one_use and is_sum(flow, operand) and have_one_shape(operand, total)
