"""The pruning pass on its own: joint graphs of functions with gates, against autograd with ``.detach()``.

No part of the package but the gate and the pass is used here. A function under test takes ``(mark, *inputs)`` and calls
``mark(value, label)`` where a gate goes: for the pass that puts the gate operator, for the oracle it detaches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import aot_function, min_cut_rematerialization_partition
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from dropbp_fx import _torch
from dropbp_fx.graph.gate import GATE, GATE_BACKWARD, gate, gate_label_of
from dropbp_fx.graph.prune import prune_cache_key, prune_joint_graph, prune_pass

aten = torch.ops.aten
Mark = Callable[[Tensor, int], Tensor]
Gradients = tuple[Tensor | None, ...]


# ---- tracing, running, and the oracle --------------------------------------------------------------------------------


class _Captured(Exception):
    """AOTAutograd has traced the joint graph; nothing after that is wanted."""


@dataclasses.dataclass
class Joint:
    """A joint graph and what is needed to run it."""

    gm: fx.GraphModule
    partition_arguments: dict[str, Any]
    inputs: tuple[Any, ...]
    outputs: int

    def count(self, *targets: object) -> int:
        return sum(node.op == "call_function" and node.target in targets for node in self.gm.graph.nodes)

    def targets(self) -> set[object]:
        return {node.target for node in self.gm.graph.nodes if node.op == "call_function"}

    def tangents(self) -> list[fx.Node]:
        return [node for node in self.gm.graph.nodes if str(node.target).startswith("tangents_")]

    def gradient_nodes(self) -> list[fx.Node]:
        """Nodes that depend on a tangent, placeholders not counted."""
        dependent = set(self.tangents())
        for node in self.gm.graph.nodes:
            if any(parent in dependent for parent in node.all_input_nodes):
                dependent.add(node)
        return [node for node in dependent if node.op == "call_function"]

    def laid_out(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        """The tangents in the layout they were traced with, as AOTAutograd hands them over at run time."""
        found = []
        for tangent, node in zip(tangents, self.tangents(), strict=True):
            strides = node.meta["val"].stride()
            static = all(isinstance(stride, int) for stride in strides)
            found.append(tangent.new_empty_strided(tangent.shape, strides).copy_(tangent) if static else tangent)
        return found

    def run(self, tangents: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Gradients]:
        """The forward outputs and one gradient (or ``None``) an input."""
        with torch.no_grad():
            values = fx.Interpreter(self.gm).run(*self.inputs, *self.laid_out(tangents), enable_io_processing=False)
        assert len(values) == self.outputs + len(self.inputs)
        return tuple(values[: self.outputs]), tuple(values[self.outputs :])

    def run_partitioned(self, tangents: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Gradients]:
        """The same by way of separate forward and backward graphs."""
        forward, backward = self.partition()
        with torch.no_grad():
            values = list(fx.Interpreter(forward).run(*self.inputs, enable_io_processing=False))
            outputs, saved = values[: self.outputs], values[self.outputs :]
            by_name = dict(zip(_output_names(forward)[self.outputs :], saved, strict=True))
            arrived = iter(self.laid_out(tangents))
            placeholders = [node.name for node in backward.graph.nodes if node.op == "placeholder"]
            arguments = [next(arrived) if n.startswith("tangents_") else by_name[n] for n in placeholders]
            gradients = fx.Interpreter(backward).run(*arguments, enable_io_processing=False)
        return tuple(outputs), tuple(gradients)

    def partition(self) -> tuple[fx.GraphModule, fx.GraphModule]:
        self.gm.recompile()
        forward, backward = min_cut_rematerialization_partition(
            self.gm, self.inputs, num_fwd_outputs=self.outputs, **self.partition_arguments
        )
        return forward, backward

    def saved_activations(self) -> list[fx.Node]:
        """What the partitioned forward saves for its backward, inputs and parameters not counted."""
        forward, _ = self.partition()
        (output,) = (node for node in forward.graph.nodes if node.op == "output")
        saved = output.args[0][self.outputs :]
        return [node for node in saved if isinstance(node, fx.Node) and node.op != "placeholder"]

    def saved_bytes(self) -> int:
        return sum(node.meta["val"].numel() * node.meta["val"].element_size() for node in self.saved_activations())


def _output_names(gm: fx.GraphModule) -> list[str]:
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    return [node.name for node in output.args[0]]


def joint_of(function: Callable[..., Any], *inputs: Any, dynamic: bool = False) -> Joint:
    """Trace ``function`` with gates into a joint graph."""
    captured: dict[str, Any] = {}

    def capture(gm: fx.GraphModule, _: Any, *, num_fwd_outputs: int, **arguments: Any) -> tuple[Any, Any]:
        captured.update(gm=gm, arguments=arguments, outputs=num_fwd_outputs)
        raise _Captured

    def refuse(*_: Any) -> Any:
        raise AssertionError("the function needs no gradient: there is no joint graph to test")

    def gated(*values: Any) -> Any:
        return function(gate, *values)

    with pytest.raises(_Captured):
        aot_function(gated, fw_compiler=refuse, partition_fn=capture, dynamic=dynamic)(*inputs)
    return Joint(captured["gm"], captured["arguments"], inputs, captured["outputs"])


def marker(dropped: Collection[int]) -> Mark:
    return lambda value, label: value.detach() if label in dropped else value


def detach_oracle(
    function: Callable[..., Any], inputs: Sequence[Any], dropped: Collection[int], tangents: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], Gradients]:
    """Eager autograd, with ``.detach()`` where a gate is dropped."""
    values = function(marker(dropped), *inputs)
    outputs = values if isinstance(values, tuple) else (values,)
    wanted = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
    reached = [(output, grad) for output, grad in zip(outputs, tangents, strict=True) if output.requires_grad]
    found: Gradients = (None,) * len(wanted)
    if reached:
        ends, arriving = zip(*reached, strict=True)
        found = torch.autograd.grad(ends, wanted, arriving, allow_unused=True)
    gradients = iter(found)
    return tuple(output.detach() for output in outputs), tuple(
        next(gradients) if isinstance(value, Tensor) and value.requires_grad else None for value in inputs
    )


def random_tangents(function: Callable[..., Any], inputs: Sequence[Any]) -> list[Tensor]:
    """A gradient for each output of a function all of whose outputs require one."""
    values = function(marker(()), *inputs)
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
        for value in (values if isinstance(values, tuple) else (values,))
    ]


def assert_same(actual: tuple[Sequence[Tensor], Gradients], expected: tuple[Sequence[Tensor], Gradients]) -> None:
    for output, wanted in zip(actual[0], expected[0], strict=True):
        torch.testing.assert_close(output, wanted)
    assert [g is None for g in actual[1]] == [g is None for g in expected[1]], "other gradients are None"
    for mine, theirs in zip(actual[1], expected[1], strict=True):
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine, theirs)


def pruned(function: Callable[..., Any], *inputs: Any, dropped: Collection[int], dynamic: bool = False) -> Joint:
    """Trace, prune, and check against the oracle before and after partitioning."""
    joint = joint_of(function, *inputs, dynamic=dynamic)
    prune_joint_graph(joint.gm.graph, dropped)
    if not dynamic:
        tangents = random_tangents(function, inputs)
        expected = detach_oracle(function, inputs, dropped, tangents)
        assert_same(joint.run(tangents), expected)
        assert_same(joint.run_partitioned(tangents), expected)
    return joint


def leaf(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


# ---- random programs -------------------------------------------------------------------------------------------------

#: Every value of a program is 4 x 6 or 6 x 4.
CONSTANTS = {
    "mask": torch.tensor([[bool((row * 6 + column) % 3) for column in range(6)] for row in range(4)]),
    "ids": torch.tensor([2, 0, 2, 1, 1, 0]),
}
Parameters = dict[str, Tensor]
Operator = Callable[[Tensor, Tensor, Parameters], Tensor]


_SHAPES: dict[str, tuple[int, ...]] = {
    "square4": (4, 4),
    "square6": (6, 6),
    "tall4": (8, 4),
    "tall6": (12, 6),
    "row4": (4,),
    "row6": (6,),
    "table4": (3, 4),
    "table6": (3, 6),
    "kernel4": (4, 4, 3),
    "kernel6": (6, 6, 3),
}


def parameters() -> Parameters:
    return {name: leaf(*shape, seed=seed) * 0.5 for seed, (name, shape) in enumerate(_SHAPES.items())}


def _of(name: str, x: Tensor, p: Parameters) -> Tensor:
    return p[f"{name}{x.shape[-1]}"]


def _alike(x: Tensor, y: Tensor) -> Tensor:
    return y if y.shape == x.shape else y.t()


def _halves(x: Tensor, y: Tensor, p: Parameters) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat([right, left.tanh()], -1)


def _pieces(x: Tensor, y: Tensor, p: Parameters) -> Tensor:
    first, second, third = x.split([1, 2, 1] if x.shape[0] == 4 else [1, 2, 3], 0)
    return torch.cat([third, y[:1].sigmoid() if y.shape == x.shape else first, second], 0)


def _attention(x: Tensor, y: Tensor, p: Parameters) -> Tensor:
    return F.scaled_dot_product_attention(x[None, None], y[None, None], (x * y)[None, None])[0, 0]


def _rows(x: Tensor, y: Tensor, p: Parameters) -> Tensor:
    return x + F.embedding(p["ids"][: x.shape[0]], _of("table", x, p))


OPERATORS: dict[str, Operator] = {
    # linear
    "matmul": lambda x, y, p: x @ _of("square", x, p),
    "add": lambda x, y, p: x + y,
    "add_alpha": lambda x, y, p: torch.add(x, y, alpha=-0.7),
    "sub": lambda x, y, p: x - y,
    "add_inplace": lambda x, y, p: x.clone().add_(y),
    "scale": lambda x, y, p: x * 0.8,
    "bias": lambda x, y, p: x + _of("row", x, p),
    "transpose": lambda x, y, p: x.t(),
    "transpose_copy": lambda x, y, p: x.t().contiguous() * 0.9,
    "reshape": lambda x, y, p: x.reshape(x.shape[1], x.shape[0]),
    "cat": lambda x, y, p: torch.cat([x, y], -1) @ _of("tall", x, p),
    "chunk": _halves,
    "split": _pieces,
    "stack": lambda x, y, p: torch.stack([x, y, x.tanh()]).mean(0),
    "unbind": lambda x, y, p: torch.stack(x.unbind(1)[::-1], 1),
    "sum_expand": lambda x, y, p: x.sum(0, keepdim=True).expand_as(x) * 0.3,
    "broadcast": lambda x, y, p: x + y.mean(-1, keepdim=True),
    "where": lambda x, y, p: torch.where(_alike(x, p["mask"]), x, y),
    "index": lambda x, y, p: x[p["ids"][: x.shape[0]]],
    "cast": lambda x, y, p: x.to(torch.complex128).real + y,
    # not linear
    "tanh": lambda x, y, p: x.tanh(),
    "relu": lambda x, y, p: x.relu(),
    "softmax": lambda x, y, p: x.softmax(-1),
    "layer_norm": lambda x, y, p: F.layer_norm(x, x.shape[-1:], _of("row", x, p)),
    "mul": lambda x, y, p: x * y,
    "attention": _attention,
    "embedding": _rows,
    "conv": lambda x, y, p: F.conv1d(x.t()[None], _of("kernel", x, p), padding=1)[0].t(),
}


@dataclasses.dataclass(frozen=True)
class Step:
    """``values.append(operator(values[first], values[second]))``; a label makes it a gate instead."""

    operator: str
    first: int
    second: int
    label: int | None

    def __repr__(self) -> str:
        what = self.operator if self.label is None else f"gate[{self.label}]"
        return f"{what}({self.first}, {self.second})"


@dataclasses.dataclass(frozen=True)
class Program:
    """A random function of two activations and a set of parameters."""

    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    frozen: frozenset[str]

    def inputs(self) -> list[Tensor]:
        values = [leaf(4, 6, seed=20), leaf(4, 6, seed=21)]
        values += [value.detach().requires_grad_(name not in self.frozen) for name, value in parameters().items()]
        return values + list(CONSTANTS.values())

    def __call__(self, mark: Mark, first: Tensor, second: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip([*_SHAPES, *CONSTANTS], rest, strict=True))
        values = [first, second]
        for step in self.steps:
            x, y = values[step.first % len(values)], values[step.second % len(values)]
            if step.label is not None:
                values.append(mark(x, step.label))
            else:
                values.append(OPERATORS[step.operator](x, _alike(x, y), named))
        # Fresh tensors: AOTAutograd would take outputs that are views of inputs out of the graph.
        return tuple(values[-1 - pick % len(values)] * 1.5 for pick in self.outputs)


_steps = st.builds(
    Step,
    operator=st.sampled_from(sorted(OPERATORS)),
    # counted from the newest value, so that most programs are deep and values are used again now and then
    first=st.integers(-4, -1),
    second=st.integers(-6, -1),
    label=st.one_of(st.none(), st.none(), st.integers(0, 2)),
)
programs = st.builds(
    Program,
    steps=st.lists(_steps, min_size=2, max_size=12).map(tuple),
    outputs=st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True).map(tuple),
    frozen=st.frozensets(st.sampled_from(sorted(_SHAPES)), max_size=4),
)


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(program=programs, dropped=st.frozensets(st.integers(0, 2)))
def test_any_program_pruned_of_any_labels_has_the_gradients_of_autograd_with_detach(
    program: Program, dropped: frozenset[int]
) -> None:
    check_pruned(program, dropped)


@pytest.mark.thorough
@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(program=programs, dropped=st.frozensets(st.integers(0, 2)))
def test_more_programs_pruned_of_any_labels_have_the_gradients_of_autograd_with_detach(
    program: Program, dropped: frozenset[int]
) -> None:
    check_pruned(program, dropped)


def check_pruned(program: Program, dropped: frozenset[int]) -> None:
    inputs = program.inputs()
    tangents = random_tangents(program, inputs)
    expected = detach_oracle(program, inputs, dropped, tangents)
    joint = joint_of(program, *inputs)
    prune_joint_graph(joint.gm.graph, dropped)
    assert joint.count(GATE, GATE_BACKWARD) == 0
    assert_same(joint.run(tangents), expected)
    before = str(joint.gm.graph)
    assert prune_joint_graph(joint.gm.graph, dropped) == 0
    assert str(joint.gm.graph) == before
    assert_same(joint.run_partitioned(tangents), expected)


# ---- single cases ----------------------------------------------------------------------------------------------------


def residual(mark: Mark, x: Tensor, w: Tensor) -> Tensor:
    return (x + mark((x @ w).tanh(), 0)) * 2.0


def test_the_gate_itself_is_an_identity_with_a_correct_gradient_and_a_readable_label() -> None:
    x = leaf(3, 2)
    torch.library.opcheck(gate, (x, 3))
    y = gate(x, 3)
    assert torch.equal(y, x)
    assert y.data_ptr() != x.data_ptr()
    assert gate_label_of(y.grad_fn) == 3
    assert gate_label_of((x * 2).grad_fn) is None
    assert torch.autograd.gradcheck(lambda value: gate(value, 0), (x,))


def test_without_dropped_labels_every_gate_goes_and_every_gradient_stays() -> None:
    joint = pruned(residual, leaf(4, 6), leaf(6, 6, seed=1), dropped=())
    assert joint.count(GATE, GATE_BACKWARD) == 0
    plain = joint_of(lambda mark, x, w: residual(marker(()), x, w), leaf(4, 6), leaf(6, 6, seed=1))
    assert [node.target for node in joint.gm.graph.nodes] == [node.target for node in plain.gm.graph.nodes]


def test_a_dropped_residual_branch_leaves_the_tangent_of_its_add_alone() -> None:
    joint = pruned(residual, leaf(4, 6), leaf(6, 6, seed=1), dropped={0})
    (only,) = joint.gradient_nodes()
    assert only.target is aten.mul.Tensor, "the gradient of x is the incoming one times two: no add, no zeros"
    assert joint.count(aten.full.default, aten.tanh_backward.default) == 0


def test_dropping_everything_returns_none_for_every_input_and_keeps_no_node_of_the_backward() -> None:
    def function(mark: Mark, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return mark((x @ w).tanh(), 0) * 2, mark(x, 1).softmax(-1)

    joint = joint_of(function, leaf(4, 6), leaf(6, 6, seed=1))
    assert joint.gradient_nodes()
    prune_joint_graph(joint.gm.graph, {0, 1})
    assert joint.gradient_nodes() == []
    _, gradients = joint.run([leaf(4, 6), leaf(4, 6)])
    assert gradients == (None, None)


def test_the_zero_of_an_attention_runs_through_all_outputs_of_its_backward() -> None:
    def function(mark: Mark, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q + mark(F.scaled_dot_product_attention(q, k, v), 0)

    joint = pruned(function, *(leaf(1, 2, 5, 4, seed=seed) for seed in range(3)), dropped={0})
    assert joint.gradient_nodes() == []
    assert not any("attention" in str(t) and "backward" in str(t) for t in joint.targets())


def test_a_layer_norm_below_a_dropped_gate_gives_none_for_its_weight_and_bias_too() -> None:
    def function(mark: Mark, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return x + mark(F.layer_norm(x, (6,), weight, bias), 0)

    joint = pruned(function, leaf(4, 6), leaf(6, seed=1), leaf(6, seed=2), dropped={0})
    assert aten.native_layer_norm_backward.default not in joint.targets()
    assert joint.gradient_nodes() == []


def test_a_cat_of_a_zero_and_a_kept_gradient_gets_explicit_zeros() -> None:
    def function(mark: Mark, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        left, right = (x @ w).split([2, 4], -1)
        return mark(left.tanh(), 0) * 2, right.tanh()

    joint = pruned(function, leaf(4, 6), leaf(6, 6, seed=1), dropped={0})
    (zeros,) = joint.gm.graph.find_nodes(op="call_function", target=aten.full.default)
    assert zeros.args == ([4, 2], 0)
    assert [user.target for user in zeros.users] == [aten.cat.default]
    assert joint.count(aten.tanh_backward.default) == 1


def test_a_scaled_sum_of_a_zero_and_a_kept_gradient_is_right_whichever_side_vanishes() -> None:
    class Subtract(torch.autograd.Function):
        """A function of two values whose backward subtracts and scales the two gradients."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.sin(), x.cos()

        @staticmethod
        def backward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
            return torch.add(first, second, alpha=3) - torch.sub(first, second, alpha=2)

    def function(mark: Mark, x: Tensor) -> Tensor:
        first, second = Subtract.apply(x)
        return mark(first * 2, 0) + mark(second * 5, 1)

    for dropped in ({0}, {1}):
        pruned(function, leaf(4, 6), dropped=dropped)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_sum_that_only_broadcasting_or_promotion_makes_as_large_is_not_replaced_by_its_summand(
    rows: int, dtype: torch.dtype
) -> None:
    class Uneven(torch.autograd.Function):
        """Adds gradients of different shapes and dtypes."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.sin(), x[:rows].to(dtype, copy=True)

        @staticmethod
        def backward(ctx: Any, wide: Tensor, narrow: Tensor) -> Tensor:
            return wide + narrow

    def function(mark: Mark, x: Tensor) -> Tensor:
        wide, narrow = Uneven.apply(x)
        return mark(wide * 2, 0) + mark(narrow * 2, 1).float()

    for dropped in ({0}, {1}):
        joint = pruned(function, leaf(4, 6, dtype=torch.float32), dropped=dropped)
        (gradient,) = joint.run(random_tangents(function, joint.inputs))[1]
        assert gradient is not None
        assert gradient.shape == (4, 6)
        assert gradient.dtype == torch.float32


@pytest.mark.parametrize("dropped", [(), (0,), (1,), (0, 1)])
def test_branches_in_bfloat16_on_a_float32_stream_keep_every_gradients_dtype(dropped: tuple[int, ...]) -> None:
    def function(mark: Mark, x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        x = x + mark((x.bfloat16() @ w).relu(), 0)
        return x + mark((x.bfloat16() @ v).relu(), 1).float()

    inputs = (leaf(4, 6, dtype=torch.float32), *(leaf(6, 6, seed=s, dtype=torch.bfloat16) for s in (1, 2)))
    joint = pruned(function, *inputs, dropped=dropped)
    for value, gradient in zip(inputs, joint.run(random_tangents(function, inputs))[1], strict=True):
        assert gradient is None or gradient.dtype == value.dtype


def test_a_custom_backward_that_is_not_zero_at_zero_does_not_run_below_a_dropped_gate() -> None:
    class Shifted(torch.autograd.Function):
        """A backward that is neither linear nor zero at zero."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
            return x * y

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
            return gradient.exp() + 1.0, torch.ones_like(gradient)

    def function(mark: Mark, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + mark(Shifted.apply(x, y).tanh(), 0), Shifted.apply(y, x.detach())

    for dropped in ((), (0,)):
        pruned(function, leaf(4, 6), leaf(4, 6, seed=1), dropped=dropped)


def test_a_custom_backward_that_clips_two_gradients_gets_zero_for_the_dropped_one() -> None:
    class Clip(torch.autograd.Function):
        """A backward that is not linear, but zero at zero."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, y * 3

        @staticmethod
        def backward(ctx: Any, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
            return first.clamp(-0.1, 0.1) - second.sign(), torch.where(first > 0, second, first.tanh())

    def function(mark: Mark, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        first, second = Clip.apply(x, y)
        return mark(first, 0) * 1.5, mark(second, 1) * 1.5

    for dropped in ({0}, {1}, {0, 1}):
        pruned(function, leaf(4, 6), leaf(4, 6, seed=1), dropped=dropped)


def test_a_random_backward_below_a_dropped_gate_does_not_run() -> None:
    class Noise(torch.autograd.Function):
        """Impure: ordinary dead-code elimination keeps a random operator."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient.bernoulli(0.5)

    def function(mark: Mark, x: Tensor) -> Tensor:
        return x + mark(Noise.apply(x), 0)

    joint = joint_of(function, leaf(4, 6))
    assert any(node.is_impure() for node in joint.gradient_nodes())
    prune_joint_graph(joint.gm.graph, {0})
    assert joint.gradient_nodes() == []


def test_a_dropout_mask_is_the_same_with_and_without_its_backward() -> None:
    def function(mark: Mark, x: Tensor, w: Tensor) -> Tensor:
        return x + mark(F.dropout(x @ w, 0.5, training=True), 0)

    tangents = [leaf(4, 6, seed=5)]
    found = {}
    for dropped in ((), (0,)):
        joint = joint_of(function, leaf(4, 6), leaf(6, 6, seed=1))
        prune_joint_graph(joint.gm.graph, dropped)
        torch.manual_seed(0)
        found[dropped] = joint.run(tangents)
    assert torch.equal(found[()][0][0], found[(0,)][0][0])
    assert found[(0,)][1][1] is None


def test_a_gate_below_a_dropped_gate_vanishes_with_it_and_one_above_is_kept() -> None:
    def function(mark: Mark, x: Tensor, u: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return x + mark(mark(mark(x @ u, 0).tanh() @ v, 1).tanh() @ w, 2)

    inputs = (leaf(4, 6), *(leaf(6, 6, seed=seed) for seed in (1, 2, 3)))
    nones = {}
    for label in (0, 1, 2):
        joint = pruned(function, *inputs, dropped={label})
        _, gradients = joint.run([leaf(4, 6)])
        nones[label] = [gradient is None for gradient in gradients]
    assert nones == {
        0: [False, True, False, False],
        1: [False, True, True, False],
        2: [False, True, True, True],
    }


def test_one_label_on_several_values_drops_them_together() -> None:
    def function(mark: Mark, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return x + mark((x @ u).tanh(), 0), mark(x @ v, 0) * 2

    joint = pruned(function, leaf(4, 6), leaf(6, 6, seed=1), leaf(6, 6, seed=2), dropped={0})
    _, gradients = joint.run([leaf(4, 6)] * 2)
    assert [gradient is None for gradient in gradients] == [False, True, True]


def test_a_value_used_inside_and_outside_a_branch_keeps_the_outside_gradient() -> None:
    def function(mark: Mark, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        shared = (x @ w).tanh()
        return x + mark(shared * shared, 0), shared.exp()

    joint = pruned(function, leaf(4, 6), leaf(6, 6, seed=1), dropped={0})
    assert joint.count(aten.full.default) == 0


def test_labels_that_the_graph_does_not_hold_change_nothing() -> None:
    known = pruned(residual, leaf(4, 6), leaf(6, 6, seed=1), dropped={0})
    more = pruned(residual, leaf(4, 6), leaf(6, 6, seed=1), dropped={0, 7, -1})
    assert str(known.gm.graph) == str(more.gm.graph)


def test_a_gate_on_a_value_without_gradient_is_removed_like_any_other() -> None:
    def function(mark: Mark, x: Tensor, constant: Tensor) -> Tensor:
        return x * mark(constant.tanh(), 0)

    joint = pruned(function, leaf(4, 6), leaf(4, 6, seed=1, grad=False), dropped={0})
    assert joint.count(GATE, GATE_BACKWARD) == 0
    assert len(joint.gradient_nodes()) == 1


def test_the_returned_count_is_that_of_the_nodes_removed_besides_gates() -> None:
    joint = joint_of(residual, leaf(4, 6), leaf(6, 6, seed=1))
    before = {node.name for node in joint.gm.graph.nodes if node.target not in (GATE, GATE_BACKWARD)}
    removed = prune_joint_graph(joint.gm.graph, {0})
    after = {node.name for node in joint.gm.graph.nodes}
    assert removed == len(before - after) > 3


def test_the_returned_count_does_not_subtract_zeros_that_were_put_in() -> None:
    def function(mark: Mark, x: Tensor) -> tuple[Tensor, Tensor]:
        left, right = x.split([2, 4], -1)
        return mark(left, 0) * 2, right * 3

    joint = joint_of(function, leaf(4, 6))
    before = {node.name for node in joint.gm.graph.nodes if node.target not in (GATE, GATE_BACKWARD)}
    removed = prune_joint_graph(joint.gm.graph, {0})
    assert removed == len(before - {node.name for node in joint.gm.graph.nodes}) == 1


def test_pruning_twice_is_pruning_once() -> None:
    joint = joint_of(residual, leaf(4, 6), leaf(6, 6, seed=1))
    prune_joint_graph(joint.gm.graph, {0})
    once = str(joint.gm.graph)
    assert prune_joint_graph(joint.gm.graph, {0}) == 0
    assert str(joint.gm.graph) == once


def test_the_pass_for_a_compilers_hook_does_what_the_function_does() -> None:
    labels = {0}
    hook = prune_pass(labels)
    labels.clear()  # the pass keeps labels of its own
    first, second = (joint_of(residual, leaf(4, 6), leaf(6, 6, seed=1)) for _ in range(2))
    hook(first.gm.graph)
    prune_joint_graph(second.gm.graph, {0})
    assert str(first.gm.graph) == str(second.gm.graph)


def test_cache_keys_tell_sets_of_labels_apart_and_not_their_order() -> None:
    sets: list[tuple[int, ...]] = [(), (0,), (1,), (0, 1), (10,), (1, 0, 1)[:2], (2, 1)]
    keys = [prune_cache_key(labels) for labels in sets]
    assert keys[5] == keys[3]
    assert len(set(keys)) == len({frozenset(labels) for labels in sets})


@pytest.mark.parametrize("dropped", [(), (0,)])
def test_strides_that_later_views_rely_on_survive_the_removal_of_an_add(dropped: tuple[int, ...]) -> None:
    def function(mark: Mark, x: Tensor) -> tuple[Tensor, Tensor]:
        shaped = (x * 2.0).view(6, 4)
        other = shaped.t().contiguous() * 3.0
        return mark(shaped.tanh(), 0) * 1.5, other

    pruned(function, leaf(4, 6), dropped=dropped)


def test_strides_that_later_views_rely_on_survive_explicit_zeros() -> None:
    class Both(torch.autograd.Function):
        """Subtracts two gradients, the first of which decides the strides of the difference."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.sin(), x.cos()

        @staticmethod
        def backward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
            return torch.sub(first, second).t().reshape(24).reshape(4, 6).t()

    def function(mark: Mark, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = Both.apply(x)
        return mark(first, 0).t().contiguous().tanh(), second.t().contiguous().tanh()

    pruned(function, leaf(6, 4), dropped={0})


# ---- memory ----------------------------------------------------------------------------------------------------------


def mlp(mark: Mark, x: Tensor, *weights: Tensor) -> Tensor:
    for label in range(len(weights) // 2):
        up, down = weights[2 * label : 2 * label + 2]
        hidden = F.gelu(F.layer_norm(x, x.shape[-1:]) @ up)
        x = x + mark(hidden @ down, label)
    return x


def test_a_dropped_branch_saves_no_activation_for_the_backward_graph() -> None:
    weights = [leaf(*((32, 128) if i % 2 == 0 else (128, 32)), seed=i) * 0.1 for i in range(4)]
    inputs = [leaf(64, 32), *(w.detach().requires_grad_() for w in weights)]
    saved = {}
    for dropped in ((), (0,), (1,), (0, 1)):
        joint = joint_of(mlp, *inputs)
        prune_joint_graph(joint.gm.graph, dropped)
        saved[dropped] = joint.saved_bytes()
    assert saved[(0, 1)] == 0
    assert saved[(1,)] <= saved[()] / 2
    assert saved[(0,)] <= saved[()] / 2 + 64 * 32 * 8, "the second branch's input is then an activation to save"
    assert min(saved[()], saved[(0,)], saved[(1,)]) >= 64 * 128 * 8


def test_a_forward_value_only_a_dropped_branchs_backward_read_has_no_reader_left() -> None:
    def function(mark: Mark, x: Tensor, w: Tensor) -> Tensor:
        return x + mark((x @ w).tanh(), 0)

    joint = joint_of(function, leaf(4, 6), leaf(6, 6, seed=1))
    prune_joint_graph(joint.gm.graph, {0})
    (tanh,) = joint.gm.graph.find_nodes(op="call_function", target=aten.tanh.default)
    assert [user.target for user in tanh.users] == [aten.add.Tensor]


# ---- symbolic shapes -------------------------------------------------------------------------------------------------


def _symbolic_split(mark: Mark, x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    left, right = torch.cat([x, y], 0).split([3, 3], -1)
    return mark((left @ w).tanh(), 0).sum() * 1.5 + right.tanh().sum(), x.tanh()


def _symbolic_products(mark: Mark, x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    left, right = torch.cat([x, y], 0).split([3, 3], -1)
    return left.t() @ left, mark((right @ w).tanh(), 0).t() @ left.detach()


@pytest.mark.parametrize("function", [_symbolic_split, _symbolic_products])
def test_explicit_zeros_of_symbolic_size_fit_any_length(function: Callable[..., Any]) -> None:
    joint = joint_of(function, leaf(4, 6), leaf(5, 6, seed=1), leaf(3, 3, seed=2), dynamic=True)
    prune_joint_graph(joint.gm.graph, {0})
    assert joint.count(GATE, GATE_BACKWARD) == 0
    (zeros,) = joint.gm.graph.find_nodes(op="call_function", target=aten.full.default)
    assert any(isinstance(size, fx.Node) for size in zeros.args[0])
    for first, second in ((4, 5), (7, 2)):
        inputs = (leaf(first, 6, seed=3), leaf(second, 6, seed=4), leaf(3, 3, seed=2))
        tangents = random_tangents(function, inputs)
        joint = dataclasses.replace(joint, inputs=inputs)
        assert_same(joint.run(tangents), detach_oracle(function, inputs, {0}, tangents))


def test_symbolic_zeros_do_not_keep_the_dropped_branch_alive() -> None:
    joint = joint_of(_symbolic_products, leaf(4, 6), leaf(5, 6, seed=1), leaf(3, 3, seed=2), dynamic=True)
    prune_joint_graph(joint.gm.graph, {0})
    assert joint.count(aten.tanh_backward.default, GATE_BACKWARD) == 0


@pytest.mark.parametrize("dropped", [(), (0,), (1,), (0, 1)])
def test_one_pruned_graph_of_a_layer_serves_every_sequence_length(dropped: tuple[int, ...]) -> None:
    weights = [leaf(*((6, 8) if i % 2 == 0 else (8, 6)), seed=i) for i in range(4)]
    joint = joint_of(mlp, leaf(5, 6), *weights, dynamic=True)
    prune_joint_graph(joint.gm.graph, dropped)
    for length in (5, 3, 9):
        inputs = (leaf(length, 6, seed=length), *weights)
        tangents = random_tangents(mlp, inputs)
        expected = detach_oracle(mlp, inputs, dropped, tangents)
        assert_same(dataclasses.replace(joint, inputs=inputs).run(tangents), expected)


@pytest.mark.parametrize("dropped", [(0,), (1,)])
def test_aot_autograd_runs_a_pruned_graph_for_sizes_that_dynamo_marked_dynamic(dropped: tuple[int, ...]) -> None:
    layer = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 6)]).double()
    compiled_graphs = 0

    def forward(mark: Mark, x: Tensor, *_: Tensor) -> Tensor:
        left, right = x.split([2, 4], -1)
        x = x + mark(layer[1](layer[0](x).tanh()), 0)
        return x + layer[2](torch.cat([mark(left.tanh(), 1), right], -1))

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal compiled_graphs
        compiled_graphs += 1
        eager = _torch.run_graph_eagerly
        return _torch.compile_with_aot_autograd(
            gm, inputs, forward=eager, backward=eager, joint_pass=prune_pass(dropped)
        ).run

    compiled = torch.compile(lambda x: forward(gate, x), backend=backend, fullgraph=True)
    parameters_ = tuple(layer.parameters())
    for length in (5, 3, 9):
        x = leaf(length, 6, seed=length)
        torch._dynamo.mark_dynamic(x, 0)
        output = compiled(x)
        (tangent,) = random_tangents(forward, (x,))
        gradients = torch.autograd.grad(output, (x, *parameters_), tangent, allow_unused=True)
        expected = detach_oracle(forward, (x, *parameters_), dropped, [tangent])
        assert_same(((output.detach(),), gradients), expected)
    assert compiled_graphs == 1
