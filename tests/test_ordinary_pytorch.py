"""Ordinary PyTorch in and around a compiled model: eager, plain ``torch.compile`` and this backend side by side.

Each case is a forward of a small residual model. Whatever is dropped, the outputs, every gradient, the set of ``None``
gradients and what the forward leaves behind in its input and its buffers are those of the eager model whose branches are
detached; with nothing dropped they are those of ``torch.compile(backend="aot_eager")`` too.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from dropbp_fx import NoResidualBranchWarning, dropbp_backend
from tests.helpers import make_backend
from tests.oracle import detached
from tests.selection import sweep

WIDTH = 8
PATTERNS: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (2,), (0, 2), (1, 2), (0, 1))


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.hook: Callable[[Tensor, Tensor], Tensor | None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).tanh()
        if self.hook is not None and h.requires_grad:
            hook = self.hook
            h.register_hook(lambda g: hook(g, h.detach()))
        return self.down(h)


class Model(nn.Module):
    """Three residual branches; ``program`` is the forward."""

    shift: Tensor
    count: Tensor

    def __init__(self, program: Callable[[Model, Tensor], Any]) -> None:
        super().__init__()
        self.program = program
        self.branches = nn.ModuleList(Branch() for _ in range(3))
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.register_buffer("shift", torch.linspace(-1, 1, WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Any:
        return self.program(self, x)


def stream(model: Model, x: Tensor, first: int = 0, last: int = 3) -> Tensor:
    for branch in model.branches[first:last]:
        x = x + branch(x)
    return x


@dataclasses.dataclass
class Outcome:
    """What a step leaves behind."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]
    left: dict[str, Tensor]
    facts: list[Any]


def step(model: Model, run: Callable[[Tensor], Any], requires_grad: bool, *, leaf: bool = False) -> Outcome:
    torch.manual_seed(1)
    base = torch.randn(4, WIDTH, requires_grad=requires_grad)
    given = base if leaf else base * 1
    model.zero_grad()
    made = run(given)
    outputs = list(made) if isinstance(made, tuple) else [made]
    total = sum((k + 1) * value.square().sum() for k, value in enumerate(outputs) if value.requires_grad)
    if given.requires_grad and not leaf:
        total = total + given.pow(3).sum()  # the input may carry a gradient of its own by now
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    gradients["input"] = base.grad
    left = {"input": given.detach().clone(), **{name: b.clone() for name, b in model.named_buffers()}}
    facts = [given.requires_grad, [value is given for value in outputs], [value.requires_grad for value in outputs]]
    return Outcome([value.detach() for value in outputs], gradients, left, facts)


def assert_alike(actual: Outcome, expected: Outcome, what: str) -> None:
    assert actual.facts == expected.facts, what
    missing = {name for name, value in actual.gradients.items() if value is None}
    assert missing == {name for name, value in expected.gradients.items() if value is None}, what
    for mine, other in (
        (dict(enumerate(actual.outputs)), dict(enumerate(expected.outputs))),
        (actual.gradients, expected.gradients),
        (actual.left, expected.left),
    ):
        for name, value in other.items():  # type: ignore[attr-defined]
            if value is not None:
                torch.testing.assert_close(
                    mine[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{what}: {n}: {text}"
                )


def compare(
    program: Callable[[Model, Tensor], Any],
    requires_grad: bool,
    *,
    plain: bool = True,
    leaf: bool = False,
    patterns: Sequence[Collection[int]] = PATTERNS,
    steps: Callable[..., Outcome] = step,
    prepare: Callable[[Model], object] = lambda model: None,
    **options: Any,
) -> None:
    """Run ``program`` for several patterns against the oracle, and with nothing dropped against plain ``torch.compile``."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model(program)
    prepare(model)
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def again(run: Callable[[Tensor], Any]) -> Outcome:
        with torch.no_grad():
            for name, value in (*model.named_parameters(), *model.named_buffers()):
                value.copy_(start[name])
        return steps(model, run, requires_grad, leaf=leaf)

    backend = make_backend(0.5, seed=0, inner="aot_eager", **options)
    run = torch.compile(model, backend=backend)
    for pattern in patterns:
        with backend.pinned(pattern):
            actual = again(run)
        with detached(model, [f"branches.{k}" for k in pattern]):
            expected = again(model)
        assert len(backend.branches) == 3, backend.branches
        assert_alike(actual, expected, f"pattern {list(pattern)}")
    if plain:
        with backend.pinned(()):
            actual = again(run)
        assert_alike(actual, again(torch.compile(model, backend="aot_eager")), "plain torch.compile")
    for _ in range(3):
        again(run)  # drawn at random


# ---- in-place changes of inputs and buffers --------------------------------------------------------------------------


def add_scalar(m: Model, x: Tensor) -> Tensor:
    x.add_(1.0)
    return stream(m, x)


def normalise(m: Model, x: Tensor) -> Tensor:
    x.sub_(x.mean(-1, keepdim=True)).div_(2.0)
    return stream(m, x)


def set_column(m: Model, x: Tensor) -> Tensor:
    x[:, 0] = 0.0
    return stream(m, x)


def write_through_view(m: Model, x: Tensor) -> Tensor:
    x.view(-1)[1:5].mul_(3.0)
    return stream(m, x)


def keep_a_view(m: Model, x: Tensor) -> Tensor:
    first = x[0]
    x.add_(1.0)
    first.mul_(2.0)
    return stream(m, x) + first


def augmented_residual(m: Model, x: Tensor) -> Tensor:
    for branch in m.branches:
        x += branch(x.clone())
    return x * 2


def learned_write(m: Model, x: Tensor) -> Tensor:
    x.mul_(m.scale)
    return stream(m, x)


def write_between(m: Model, x: Tensor) -> Tensor:
    y = stream(m, x * 1, 0, 1)
    x.add_(1.0)
    y = stream(m, y + x, 1, 2)
    x.mul_(0.5)
    return stream(m, y + x, 2, 3)


def write_late(m: Model, x: Tensor) -> Tensor:
    y = stream(m, x * 1)
    x.zero_()
    return y


def write_a_branch_into_it(m: Model, x: Tensor) -> Tensor:
    y = stream(m, x * 1, 0, 2)
    x.copy_(y)
    return stream(m, y, 2, 3)


def return_it(m: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    x.add_(1.0)
    return stream(m, x), x


def return_the_result(m: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.add_(1.0)
    return stream(m, x), x


def return_a_view(m: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    x.add_(1.0)
    return stream(m, x), x[1:, 2]


def write_without_gradient(m: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        x.mul_(0.5)
    return stream(m, x)


def write_data(m: Model, x: Tensor) -> Tensor:
    x.detach().mul_(0.5)
    return stream(m, x)


def write_a_parameter(m: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.branches[1].up.weight.mul_(0.5)  # type: ignore[union-attr, operator]
    return stream(m, x)


def scale_a_buffer(m: Model, x: Tensor) -> Tensor:
    m.shift.mul_(0.9)
    m.count.add_(1)
    return stream(m, x + m.shift * m.count)


def copy_into_a_buffer(m: Model, x: Tensor) -> Tensor:
    m.shift.copy_(x.detach().mean(0))
    return stream(m, x - m.shift)


def average_late(m: Model, x: Tensor) -> Tensor:
    y = stream(m, x)
    m.shift.lerp_(y.detach().mean(0), 0.1)
    return y


def buffer_as_stream(m: Model, x: Tensor) -> Tensor:
    m.shift.mul_(0.9)
    return stream(m, m.shift) + x


def foreach_write(m: Model, x: Tensor) -> Tensor:
    torch._foreach_mul_([x, m.shift], 0.5)
    return stream(m, x + m.shift)


def write_after_the_add(m: Model, x: Tensor) -> Tensor:
    for branch in m.branches:
        x = x + branch(x)
        x.mul_(0.9)
        x[:, 0].add_(1.0)
    return x


WRITES = [
    *(add_scalar, normalise, set_column, write_through_view, keep_a_view, augmented_residual, learned_write),
    *(write_between, write_late, write_a_branch_into_it, return_it, return_the_result, return_a_view),
    *(write_without_gradient, write_data, write_a_parameter, scale_a_buffer, copy_into_a_buffer, average_late),
    *(buffer_as_stream, foreach_write, write_after_the_add),
]


@pytest.mark.parametrize("requires_grad", sweep([False, True], [True]), ids=["data", "gradient"])
@pytest.mark.parametrize(
    "program",
    sweep(WRITES, [add_scalar, keep_a_view, write_between, scale_a_buffer]),
    ids=lambda program: program.__name__,
)
def test_a_forward_may_change_its_input_and_buffers_in_place(
    program: Callable[[Model, Tensor], Any], requires_grad: bool
) -> None:
    compare(program, requires_grad, plain=program is not learned_write)  # there plain saves what it then overwrites


def test_a_default_device_changes_nothing() -> None:
    """It is a mode that every call goes through, also while Dynamo traces."""
    with torch.device(torch.get_default_device()):
        compare(stream, True)


# ---- hooks on tensors ------------------------------------------------------------------------------------------------


def hook_on_the_stream(m: Model, x: Tensor) -> Tensor:
    for branch in m.branches:
        x = x + branch(x)
        if x.requires_grad:
            x.register_hook(lambda g: g.clamp(-0.5, 0.5))
    return x


def hook_on_branches(m: Model, x: Tensor) -> Tensor:
    for branch in m.branches:
        h = branch(x) * 1
        if h.requires_grad:
            h.register_hook(lambda g: g.clamp(-0.5, 0.5))
        x = x + h
    return x


def hook_on_the_skip(m: Model, x: Tensor) -> Tensor:
    x = x * m.scale
    x.register_hook(lambda g: g * 2)
    return stream(m, x)


def hook_that_only_looks(m: Model, x: Tensor) -> Tensor:
    x = stream(m, x)
    x.register_hook(lambda g: None)
    return x * 2


def hook_twice(m: Model, x: Tensor) -> Tensor:
    x = stream(m, x, 0, 2) * m.scale
    x.register_hook(lambda g: g.clamp(-1, 1))
    x.register_hook(lambda g: g * 3)
    return stream(m, x, 2, 3)


def hook_and_checkpoint(m: Model, x: Tensor) -> Tensor:
    def block(x: Tensor, branch: nn.Module) -> Tensor:
        y = x + branch(x)
        y.register_hook(lambda g: g.clamp(-0.5, 0.5))
        return y

    x = x * m.scale
    for branch in m.branches:
        x = checkpoint(block, x, branch, use_reentrant=False)
    return x


HOOKS = [
    *(hook_on_the_stream, hook_on_branches, hook_on_the_skip, hook_that_only_looks, hook_twice, hook_and_checkpoint),
]


@pytest.mark.parametrize("requires_grad", sweep([False, True], [True]), ids=["data", "gradient"])
@pytest.mark.parametrize(
    "program", sweep(HOOKS, [hook_on_the_stream, hook_on_branches]), ids=lambda program: program.__name__
)
def test_a_forward_may_put_hooks_on_its_tensors(program: Callable[[Model, Tensor], Any], requires_grad: bool) -> None:
    compare(program, requires_grad)


INNER_HOOKS: dict[str, Callable[[Tensor, Tensor], Tensor | None]] = {
    "scales": lambda g, h: g * 0.5,
    "is not linear": lambda g, h: g + 1.0,
    "adds another value": lambda g, h: g + h,
    "ignores its gradient": lambda g, h: h * 0.1,
    "only looks": lambda g, h: None,
}


@pytest.mark.parametrize(
    "hook", sweep([*INNER_HOOKS.values()], [INNER_HOOKS["adds another value"]]), ids=INNER_HOOKS.keys()
)
def test_a_hook_inside_of_a_branch_runs_where_the_branch_is_kept(hook: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Autograd does not ask it in a dropped one, so it cannot make a gradient of nothing."""

    def prepare(model: Model) -> None:
        for branch in model.branches:
            branch.hook = hook  # type: ignore[assignment]

    compare(stream, False, prepare=prepare)


# ---- other things that forwards and training steps do ----------------------------------------------------------------


def no_gradient_part(m: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = torch.sigmoid(x @ m.branches[0].up.weight.t())  # type: ignore[union-attr, operator]
    return stream(m, x) * gate.mean()


def require_a_gradient(m: Model, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return stream(m, x)


def require_of_the_input(m: Model, x: Tensor) -> Tensor:
    x.requires_grad_()
    return stream(m, x)


def write_to_the_branch_after_the_add(m: Model, x: Tensor) -> Tensor:
    for branch in m.branches:
        h = branch(x) * 1
        x = x + h
        h.mul_(0.0)
        x = x + h
    return x


def return_the_input(m: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    return stream(m, x), x


def return_views(m: Model, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = stream(m, x)
    return y, y[0], x.view(-1)


def return_the_middle(m: Model, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a = stream(m, x, 0, 1)
    b = stream(m, a, 1, 2)
    return stream(m, b, 2, 3), a, b


def under_autocast(m: Model, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return stream(m, x).float()


def in_checkpoints(m: Model, x: Tensor) -> Tensor:
    for branch in m.branches:
        x = x + checkpoint(branch, x, use_reentrant=False)
    return x


def write_and_checkpoint(m: Model, x: Tensor) -> Tensor:
    x.mul_(2.0)
    return in_checkpoints(m, x)


OTHERS = [
    *(no_gradient_part, require_a_gradient, require_of_the_input, write_to_the_branch_after_the_add, return_the_input),
    *(return_views, return_the_middle, under_autocast, in_checkpoints, write_and_checkpoint),
]


@pytest.mark.parametrize("requires_grad", sweep([False, True], [True]), ids=["data", "gradient"])
@pytest.mark.parametrize(
    "program", sweep(OTHERS, [write_to_the_branch_after_the_add, return_views]), ids=lambda program: program.__name__
)
def test_other_forwards(program: Callable[[Model, Tensor], Any], requires_grad: bool) -> None:
    compare(program, requires_grad)


def around(context: Callable[[], contextlib.AbstractContextManager[Any]]) -> Callable[..., Outcome]:
    def steps(model: Model, run: Callable[[Tensor], Any], requires_grad: bool, *, leaf: bool = False) -> Outcome:
        with context():
            return step(model, run, requires_grad, leaf=leaf)

    return steps


def checkpointed_step(
    model: Model, run: Callable[[Tensor], Any], requires_grad: bool, *, leaf: bool = False
) -> Outcome:
    return step(model, lambda x: checkpoint(run, x, use_reentrant=False), requires_grad, leaf=leaf)


def keeping_step(model: Model, run: Callable[[Tensor], Any], requires_grad: bool, *, leaf: bool = False) -> Outcome:
    """Two losses of one graph, then one with ``inputs=``, then gradients that could be differentiated."""
    torch.manual_seed(1)
    x = torch.randn(4, WIDTH, requires_grad=True)
    model.zero_grad()
    made = run(x * 1)
    outputs = list(made) if isinstance(made, tuple) else [made]
    made = outputs[0]
    made[:, :4].square().sum().backward(retain_graph=True)
    made[:, 4:].sum().backward(retain_graph=True)
    made.sum().backward(retain_graph=True, inputs=[x, model.scale, model.branches[0].up.weight])  # type: ignore[union-attr]
    parameters = [*model.parameters(), x]
    found = torch.autograd.grad(made.pow(3).sum(), parameters, create_graph=True, allow_unused=True)
    gradients: dict[str, Tensor | None] = {name: p.grad for name, p in model.named_parameters()}
    gradients["input"] = x.grad
    gradients |= {f"again {k}": None if g is None else g.detach() for k, g in enumerate(found)}
    jacobian = torch.autograd.grad(
        made, x, torch.eye(made.numel()).reshape(-1, *made.shape), is_grads_batched=True, retain_graph=True
    )
    gradients["jacobian"] = jacobian[0]
    return Outcome([value.detach() for value in outputs], gradients, {}, [])


STEPS: dict[str, Callable[..., Outcome]] = {
    "save_on_cpu": around(torch.autograd.graph.save_on_cpu),
    "anomaly mode": around(lambda: torch.autograd.detect_anomaly(check_nan=False)),
    "autocast": around(lambda: torch.autocast("cpu", torch.bfloat16)),
    "eager checkpoint": checkpointed_step,
    "kept graph": keeping_step,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize(
    "program", sweep([stream, add_scalar, hook_on_the_stream], [stream]), ids=lambda program: program.__name__
)
@pytest.mark.parametrize("steps", sweep([*STEPS.values()], [keeping_step]), ids=STEPS.keys())
def test_steps(steps: Callable[..., Outcome], program: Callable[[Model, Tensor], Any]) -> None:
    if steps is checkpointed_step and program is add_scalar:
        pytest.skip("a checkpoint changes the input twice, in eager too")
    compare(program, True, steps=steps)


# ---- what cannot be taken apart --------------------------------------------------------------------------------------


def transpose_in_place(m: Model, x: Tensor) -> Tensor:
    x.t_()
    return stream(m, x.t())


def test_an_input_may_change_its_form() -> None:
    """Dynamo breaks the graph there."""
    model = Model(transpose_in_place)
    run = torch.compile(model, backend=dropbp_backend(0.0, inner="aot_eager"))
    torch.testing.assert_close(run(torch.ones(WIDTH, WIDTH)), model(torch.ones(WIDTH, WIDTH)))


def test_a_view_of_an_input_with_gaps_leaves_the_graph_whole_or_is_refused() -> None:
    whole = torch.ones(4, 2 * WIDTH)
    model = Model(return_a_view)
    reason = r"because it returns a view of an input that it writes to, .*\. Let the model write to a copy"
    run = torch.compile(model, backend=dropbp_backend(0.5, inner="aot_eager"))
    with pytest.warns(NoResidualBranchWarning, match=reason):
        made, view = run(whole[:, 3 : 3 + WIDTH])
    exact, _ = model(torch.ones(4, WIDTH))
    torch.testing.assert_close(made, exact)
    assert view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    torch._dynamo.reset()
    strict = torch.compile(model, backend=dropbp_backend(0.5, inner="aot_eager", strict=True))
    with pytest.raises(Exception, match=reason):
        strict(whole[:, 3 : 3 + WIDTH])


def test_a_write_into_memory_that_inputs_share_leaves_the_graph_whole() -> None:
    model = Model(stream)

    def forward(x: Tensor, view: Tensor) -> Tensor:
        x.add_(1.0)
        return stream(model, x) + view.sum()

    run = torch.compile(forward, backend=dropbp_backend(0.5, inner="aot_eager"))
    results = []
    for function in (forward, run):
        x = torch.ones(4, WIDTH)
        if function is run:
            with pytest.warns(NoResidualBranchWarning, match=r"into memory that several of its inputs share"):
                results.append(function(x, x[0]).detach())
        else:
            results.append(function(x, x[0]).detach())
    torch.testing.assert_close(results[1], results[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoResidualBranchWarning)
        torch._dynamo.reset()
        x = torch.ones(4, WIDTH)
        run(x, x[0])  # it was said


@pytest.mark.parametrize("program", [add_scalar, return_it], ids=lambda program: program.__name__)
def test_an_input_with_gaps_between_its_rows_may_be_changed(program: Callable[[Model, Tensor], Any]) -> None:
    model = Model(program)
    backend = dropbp_backend(0.5, seed=0, inner="aot_eager")
    run = torch.compile(model, backend=backend)
    left = []
    for function in (model, run):
        whole = torch.ones(4, 2 * WIDTH)
        made = function(whole[:, 3 : 3 + WIDTH])
        left.append([value.detach().clone() for value in (whole, *(made if isinstance(made, tuple) else (made,)))])
    for mine, theirs in zip(*left, strict=True):
        torch.testing.assert_close(theirs, mine)


def test_calibration_measures_what_a_step_would_and_leaves_a_changed_input_as_it_was() -> None:
    def written(m: Model, x: Tensor) -> Tensor:
        x.add_(1.0)
        m.shift.mul_(0.5)
        return stream(m, x + m.shift)

    def copied(m: Model, x: Tensor) -> Tensor:
        return stream(m, x + 1.0 + m.shift * 0.5)

    found = []
    for program in (written, copied):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, x = Model(program), torch.randn(4, WIDTH)
        before = x.clone(), model.shift.clone()
        backend = dropbp_backend(0.5, seed=0, inner="aot_eager")
        run = torch.compile(model, backend=backend)
        for metric in ("gradnorm", "gradient"):
            backend.calibrate(lambda run=run, x=x: run(x).square().sum(), metric=metric, progress_bar=False)  # type: ignore[arg-type, misc]
            assert backend.sensitivity is not None
            found.append(backend.sensitivity.values)
        assert torch.equal(x, before[0])
        assert torch.equal(model.shift, before[1])
    assert found[:2] == [pytest.approx(values, rel=1e-4) for values in found[2:]]


def test_blocks_that_change_a_copy_of_their_own_still_share_code() -> None:
    def program(m: Model, x: Tensor) -> Tensor:
        x.mul_(2.0)
        for branch in m.branches:
            x = x + branch(x)
        return x

    counts = []
    for function in (program, stream):
        torch._dynamo.reset()
        backend = dropbp_backend(0.5, seed=0, inner="aot_eager")
        run = torch.compile(Model(function), backend=backend)
        run(torch.randn(4, WIDTH)).sum().backward()
        counts.append(backend.stats.unique_regions)
    assert counts[0] <= counts[1] + 1, counts


def test_forward_mode_differentiation_is_refused() -> None:
    model = Model(stream)
    run = torch.compile(model, backend=dropbp_backend(0.0, inner="aot_eager"))
    x = torch.randn(4, WIDTH)
    with forward_ad.dual_level():
        run(x)  # nothing to follow
        with pytest.raises(NotImplementedError, match=r"Forward-mode AD is not supported .* Call the eager"):
            run(forward_ad.make_dual(x, torch.ones_like(x)))
    exact = torch.func.jvp(model, (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(torch.func.jvp(run, (x,), (torch.ones_like(x),))[1], exact)


def test_a_deep_copy_of_a_compiled_model_trains_its_own_parameters() -> None:
    model = Model(add_scalar)
    backend = dropbp_backend(0.5, seed=0, inner="aot_eager")
    run = torch.compile(model, backend=backend)
    run(torch.randn(4, WIDTH)).sum().backward()
    model.zero_grad()
    copied = copy.deepcopy(run)
    with backend.pinned([1]):
        actual = step(copied._orig_mod, copied, True)
    with detached(model, ["branches.1"]):
        expected = step(model, model, True)
    model.zero_grad()
    assert_alike(actual, expected, "copy")


def test_forward_hooks_that_change_the_output_of_a_compiled_model() -> None:
    model = Model(stream)
    backend = dropbp_backend(0.5, seed=0, inner="aot_eager")
    run = torch.compile(model, backend=backend)
    outcomes = []
    for function, context in ((run, backend.pinned([0, 2])), (model, detached(model, ["branches.0", "branches.2"]))):
        handle = function.register_forward_hook(lambda _m, _a, output: output * 2)
        with context:
            outcomes.append(step(model, function, True))
        handle.remove()
    assert_alike(*outcomes, "hook")
