"""Bad input gets one clear sentence before anything compiles; and what a backend is to ``==``, ``copy`` and ``pickle``."""

from __future__ import annotations

import contextlib
import copy
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from dropbp_fx import DropBPBackend, DropPolicy, _torch, dropbp_backend, lowering
from dropbp_fx.entry import dropbp
from dropbp_fx.runtime.compiler import Compiler
from tests.helpers import POLICY_FIELDS, make_backend


def function(*_: object) -> None:
    """Something callable that pickles."""


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x).tanh()
        result: Tensor = x + self.second(x).tanh()
        return result


class CountingCompiler:
    """An inner compiler that tells how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.calls += 1
        return _torch.run_graph_eagerly(gm, inputs)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> CountingCompiler:
    """Counts every inner compilation, whatever the backend was asked to compile with."""
    counter = CountingCompiler()

    def count(*_: Any, **__: Any) -> Any:
        counter.calls += 1
        raise AssertionError("compiled before the refusal")

    monkeypatch.setattr(_torch, "compile_with_inductor", count)
    monkeypatch.setattr(_torch, "compile_with_aot_autograd", count)
    monkeypatch.setattr(lowering, "find_branches", count)
    return counter


@contextlib.contextmanager
def refused_while_compiling(kind: type[Exception], text: str) -> Iterator[None]:
    """The block's forward is refused by the backend: Dynamo wraps what the backend raises."""
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=text) as caught:
        yield
    assert type(caught.value.inner_exception) is kind
    assert one_sentence(caught.value.inner_exception) in str(caught.value)


def one_sentence(error: BaseException) -> str:
    """The message, checked to be short and to read as prose: no traceback, no address of an object."""
    text = str(error)
    assert "\n" not in text
    assert " at 0x" not in text
    assert 20 < len(text) < 450
    assert text.rstrip("'\"").endswith(".")
    return text


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rate": -0.1}, ValueError, r"rate must be in \[0, 1\), not -0\.1: .*share of residual branches"),
    ({"rate": 1}, ValueError, r"rate must be in \[0, 1\), not 1: .*at rate 1 nothing would be trained"),
    ({"rate": 1.0}, ValueError, r"rate must be in \[0, 1\), not 1\.0"),
    ({"rate": 1.5}, ValueError, r"rate must be in \[0, 1\), not 1\.5"),
    ({"rate": float("nan")}, ValueError, r"rate must be in \[0, 1\), not nan"),
    ({"rate": float("inf")}, ValueError, r"rate must be in \[0, 1\), not inf"),
    ({"rate": "0.5"}, TypeError, r"rate must be a number in \[0, 1\), not '0\.5'"),
    ({"rate": True}, TypeError, r"rate must be a number in \[0, 1\), not True"),
    ({"rate": False}, TypeError, r"rate must be a number in \[0, 1\), not False"),
    ({"rate": [0.5]}, TypeError, r"rate must be a number in \[0, 1\), not \[0\.5\]"),
    ({"rate": 0.5j}, TypeError, r"rate must be a number in \[0, 1\), not 0\.5j"),
    ({"granularity": "block"}, ValueError, r"granularity must be one of 'branch', 'layer', not 'block'"),
    ({"granularity": "Layer"}, ValueError, r"granularity must be one of 'branch', 'layer', not 'Layer'"),
    ({"granularity": None}, ValueError, r"granularity must be one of 'branch', 'layer', not None"),
    ({"granularity": ["branch"]}, ValueError, r"granularity must be one of 'branch', 'layer', not \['branch'\]"),
    ({"inner": "eager"}, ValueError, r"inner must be 'inductor' or 'aot_eager' or a pair .*, not 'eager'"),
    ({"inner": None}, TypeError, r"inner must be 'inductor' or 'aot_eager' or a pair of callables .*, not None"),
    ({"inner": ["inductor", "inductor"]}, TypeError, r"a pair of callables .*, not \['inductor', 'inductor'\]"),
    ({"inner": ("inductor", "inductor")}, TypeError, r"a pair of callables .*, not \('inductor', 'inductor'\)"),
    ({"inner": (function_ := len,)}, TypeError, r"a pair of callables .*, not \(<built-in function len>,\)"),
    ({"inner": (function_, None)}, TypeError, r"a pair of callables .*, not \(<built-in function len>, None\)"),
    (
        {"options": {"max_autotun": True}},
        ValueError,
        r"Inductor has no option 'max_autotun'\. Did you mean 'max_autotune'.*list_options\(\)",
    ),
    ({"options": {"qqqqqqqq": 1}}, ValueError, r"Inductor has no option 'qqqqqqqq'\. torch\._inductor\.list_options"),
    ({"options": {"rate": 0.5}}, ValueError, r"Inductor has no option 'rate'"),
    ({"options": "max_autotune"}, TypeError, r"options must map names of Inductor options to values, not 'max_aut"),
    ({"options": [("max_autotune", True)]}, TypeError, r"options must map names .*, not \[\('max_autotune', True\)\]"),
    ({"options": {1: True}}, TypeError, r"options must map names of Inductor options to values, not \{1: True\}"),
    ({"options": []}, TypeError, r"options must map names of Inductor options to values, not \[\]"),
    ({"options": 0}, TypeError, r"options must map names of Inductor options to values, not 0"),
    (
        {"options": {"joint_custom_pre_pass": None}},
        ValueError,
        r"'joint_custom_pre_pass' is the hook this backend prunes with.*'joint_custom_post_pass'",
    ),
    (
        {"options": {"joint-custom-pre-pass": None}},
        ValueError,
        r"'joint_custom_pre_pass' is the hook this backend prunes with",
    ),
    (
        {"options": {"max_autotune": True}, "inner": "aot_eager"},
        ValueError,
        r"options go to Inductor, but inner='aot_eager'\. Drop the options, or use inner='inductor'",
    ),
    ({"seed": 1.0}, TypeError, r"seed must be an integer or None, not 1\.0"),
    ({"seed": "1"}, TypeError, r"seed must be an integer or None, not '1'"),
    ({"seed": True}, TypeError, r"seed must be an integer or None, not True"),
    ({"strict": 1}, TypeError, r"strict must be True or False, not 1"),
    ({"strict": None}, TypeError, r"strict must be True or False, not None"),
]
IDS = ["-".join(f"{name}={value!r}" for name, value in arguments.items())[:60] for arguments, _, _ in REFUSED]


@pytest.mark.parametrize(("arguments", "kind", "text"), REFUSED, ids=IDS)
def test_a_bad_argument_is_refused_with_a_sentence_that_names_it(
    arguments: dict[str, Any], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text) as caught:
        make_backend(**arguments)
    assert type(caught.value) is kind
    one_sentence(caught.value)


def _by_name(arguments: dict[str, Any]) -> dict[str, Any]:
    """As a configuration file has them: the fields of a policy in a mapping of their own."""
    fields = {name: value for name, value in arguments.items() if name in POLICY_FIELDS and name != "rate"}
    rest = {name: value for name, value in arguments.items() if name not in fields}
    return {**rest, "policy": fields} if fields else rest


@pytest.mark.parametrize(("arguments", "kind", "text"), REFUSED, ids=IDS)
def test_a_bad_option_by_name_is_refused_with_the_same_sentence_and_before_anything_compiles(
    arguments: dict[str, Any], kind: type[Exception], text: str, counting: CountingCompiler
) -> None:
    with pytest.raises(kind, match=text) as caught:
        dropbp(fx.symbolic_trace(Residual()), [torch.randn(2, 4)], options=_by_name(arguments))
    assert type(caught.value) is kind
    assert counting.calls == 0


def test_a_refusal_by_name_shows_through_torch_compile(counting: CountingCompiler) -> None:
    with refused_while_compiling(ValueError, r"rate must be in \[0, 1\), not 1\.5"):
        torch.compile(Residual(), backend=dropbp, options={"rate": 1.5})(torch.randn(2, 4))
    assert counting.calls == 0


def test_an_unknown_option_by_name_is_refused_with_the_list_of_options(counting: CountingCompiler) -> None:
    text = r"backend 'dropbp' has no option 'rat'; its options are rate, policy, inner, options, .*, seed, strict\."
    with refused_while_compiling(ValueError, text + r" Options for Inductor go into the option named 'options'"):
        torch.compile(Residual(), backend=dropbp, options={"rat": 0.5})(torch.randn(2, 4))
    assert counting.calls == 0


def test_a_policy_by_name_may_be_a_name_an_object_or_a_mapping_of_its_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[DropBPBackend] = []
    call = DropBPBackend.__call__

    def noted(backend: DropBPBackend, *arguments: Any, **named: Any) -> Any:
        made.append(backend)
        return call(backend, *arguments, **named)

    monkeypatch.setattr(DropBPBackend, "__call__", noted)
    fields = {"pattern": "lowest", "drop": "below"}
    for policy in (fields, {"rate": 0.7, **fields}, DropPolicy.named("freezing"), "freezing"):
        torch._dynamo.reset()
        options = {"policy": policy, "inner": "aot_eager", "seed": 71}
        torch.compile(Residual(), backend=dropbp, options=options)(torch.randn(2, 4))
    first, second, third, fourth = made
    assert first is third is fourth, "equal options share one backend"
    assert first.policy == DropPolicy.named("freezing")
    assert second.rate == 0.7
    torch._dynamo.reset()
    with refused_while_compiling(ValueError, r"A policy has no field 'pattrn'\. Did you mean 'pattern'\?"):
        torch.compile(Residual(), backend=dropbp, options={"policy": {"pattrn": "x"}})(torch.randn(2, 4))


def test_by_name_false_is_no_rate_of_zero_that_was_seen_before() -> None:
    """``False == 0``, also as a key of a cache."""
    model = Residual()
    torch.compile(model, backend=dropbp, options={"rate": 0, "inner": "aot_eager"})(torch.randn(2, 4))
    torch._dynamo.reset()
    with refused_while_compiling(TypeError, r"rate must be a number in \[0, 1\), not False"):
        torch.compile(model, backend=dropbp, options={"rate": False, "inner": "aot_eager"})(torch.randn(2, 4))


def test_options_of_any_type_may_be_given_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def inductor(gm: fx.GraphModule, inputs: Sequence[Any], *, options: dict[str, Any], **_: Any) -> Any:
        seen.append(options)
        return _torch.compile_with_aot_autograd(
            gm, inputs, forward=_torch.run_graph_eagerly, backward=_torch.run_graph_eagerly, joint_pass=None
        )

    monkeypatch.setattr(_torch, "compile_with_inductor", inductor)
    monkeypatch.setattr(Compiler, "cuda_graphs", False)  # which are an option too (pytest --graphs)
    options: dict[str, Any] = {"options": {"trace.debug_dir": "x", "external_matmul": []}}
    torch.compile(Residual(), backend=dropbp, options=options)(torch.randn(2, 4))
    assert seen
    assert all(given == options["options"] for given in seen)


def test_options_of_torch_compile_reach_the_object_as_inductor_options_and_are_checked(
    counting: CountingCompiler,
) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("inductor", {"rate": 0.3}, r"Inductor has no option 'rate'"),
        ("inductor", {"joint_custom_pre_pass": None}, r"is the hook this backend prunes with"),
        ("aot_eager", {"max_autotune": True}, r"options go to Inductor, but inner='aot_eager'"),
    ]
    for inner, options, text in cases:
        backend = dropbp_backend(inner=inner)
        with refused_while_compiling(ValueError, text):
            torch.compile(Residual(), backend=backend, options=options)(torch.randn(2, 4))
    assert counting.calls == 0


@pytest.mark.parametrize("rate", [0, 0.0, 0.999, np.float64(0.25)])
def test_rates_in_range_are_taken_as_floats(rate: float) -> None:
    backend = dropbp_backend(rate)
    assert backend.rate == float(rate)
    assert type(backend.rate) is float


@pytest.mark.parametrize(
    "arguments", [a for a, _, _ in REFUSED if "rate" in a], ids=lambda arguments: repr(arguments["rate"])
)
def test_a_bad_rate_set_later_is_refused_and_changes_nothing(arguments: dict[str, Any]) -> None:
    backend = dropbp_backend(0.25)
    with pytest.raises((TypeError, ValueError), match=r"rate must be .*\[0, 1\), not"):
        backend.rate = arguments["rate"]
    assert backend.rate == 0.25


def test_good_values_of_every_argument_are_taken() -> None:
    pair = (CountingCompiler(), CountingCompiler())
    for granularity in ("branch", "layer"):
        for inner in ("inductor", "aot_eager", pair):
            make_backend(granularity=granularity, inner=inner, seed=-3, strict=True, options={})
    dropbp_backend(options={"max-autotune": True, "epilogue_fusion": False})
    dropbp_backend(options=None, seed=None)


def test_a_refused_argument_leaves_a_counting_inner_compiler_uncalled() -> None:
    forward, backward = CountingCompiler(), CountingCompiler()
    for arguments in ({"rate": 2.0}, {"granularity": "x"}, {"seed": "x"}, {"strict": "x"}, {"options": {"x": 1}}):
        with pytest.raises((TypeError, ValueError)):
            make_backend(inner=(forward, backward), **arguments)
    assert forward.calls == backward.calls == 0


def test_strict_refuses_a_model_without_residual_branches_before_compiling_it() -> None:
    forward, backward = CountingCompiler(), CountingCompiler()
    backend = dropbp_backend(inner=(forward, backward), strict=True)
    with refused_while_compiling(ValueError, r"No residual branch was found in this graph"):
        torch.compile(nn.Linear(4, 4), backend=backend)(torch.randn(2, 4))
    assert forward.calls == backward.calls == 0


@pytest.mark.parametrize(
    ("dropped", "kind", "text"),
    [
        ("first", TypeError, r"pinned\(\) takes a list of branches; for one branch pass \['first'\]"),
        (1, TypeError, r"pinned\(\) takes a list of branches; for one branch pass \[1\]"),
        (None, TypeError, r"pinned\(\) takes a list of branches"),
        (["frist"], KeyError, r"no branch named 'frist'; did you mean 'first'.*backend\.branches"),
        ([2], IndexError, r"no branch 2: the model has 2 residual branches, numbered 0 to 1 in execution order"),
        ([0.5], TypeError, r"by its index or its name, not by 0\.5"),
        ([0, 1], ValueError, r"drops all 2 branches that have trainable parameters.*Keep at least one"),
        (["first", 1], ValueError, r"drops all 2 branches that have trainable parameters"),
    ],
)
def test_a_bad_pin_is_refused_before_the_forward_compiles_a_variant(
    dropped: Any, kind: type[Exception], text: str
) -> None:
    model = Residual()
    counter = CountingCompiler()
    backend = dropbp_backend(inner=(counter, counter), seed=0)
    compiled = torch.compile(model, backend=backend)
    with backend.disabled():
        compiled(torch.randn(2, 4)).sum().backward()
    calls = counter.calls
    with pytest.raises(kind, match=text) as caught, backend.pinned(dropped):
        compiled(torch.randn(2, 4))
    one_sentence(caught.value)
    assert counter.calls == calls


def test_a_single_branch_object_is_no_list_of_branches() -> None:
    backend = dropbp_backend(inner="aot_eager")
    torch.compile(Residual(), backend=backend)(torch.randn(2, 4))
    with pytest.raises(TypeError, match=r"pinned\(\) takes a list of branches"):
        backend.pinned(backend.branches[0])


@pytest.mark.parametrize("state", [{}, {"version": 1}, {"version": "2", "rate": 0.5}])
def test_a_state_of_something_else_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"no state of a dropbp_fx backend of version 3.*Pass what state_dict"):
        dropbp_backend().load_state_dict(state)


# ---- repr, equality, copies ------------------------------------------------------------------------------------------


def test_the_repr_is_one_readable_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compiler, "cuda_graphs", False)  # which have a line of their own (pytest --graphs)
    backend = make_backend(0.25, granularity="layer", inner="aot_eager", seed=3)
    assert repr(backend).splitlines() == [
        "DropBPBackend",
        "  policy    of its own: pattern random, schedule constant, granularity layer",
        "  rate      0.25 asked for, no training forward yet",
        "  progress  0",
        "  branches  none before the first forward",
        "  variants  0 compiled in 0.0 seconds, of 0 regions in 0 graphs",
        "  compiler  aot_eager",
        "  seed      3",
    ]
    run = torch.compile(Residual(), backend=backend)
    with backend.pinned([0]):
        run(torch.randn(2, 4))
    backend.rate = 0.5
    backend.progress = 0.125
    lines = repr(backend).splitlines()
    assert lines[2:5] == [
        "  rate      0.5 asked for, 0.5 realised in 1 training forward",
        "  progress  0.125",
        "  branches  2, 2 of them droppable",
    ]
    assert re.match(r"  variants  [1-9]\d* compiled in \d+\.\d seconds, of [1-9]\d* regions? in 1 graph$", lines[5])
    assert "policy    progressive_freezing: pattern lowest, schedule late_ramp, drop below" in repr(
        dropbp_backend(0.7, policy="progressive_freezing")
    )


def test_notebooks_show_the_same_as_a_table() -> None:
    def less_than_all(progress: float) -> float:
        return 0.25

    backend = make_backend(schedule=less_than_all, inner=(function, function))
    table = backend._repr_html_()
    assert table.startswith("<table>")
    for line in repr(backend).splitlines()[1:]:
        name, value = line.split(maxsplit=1)
        assert f">{name}</th>" in table
        assert f">{value}</td>" in table


DIFFERENT: list[dict[str, Any]] = [
    {},
    {"rate": 0.25},
    {"granularity": "layer"},
    {"inner": "aot_eager"},
    {"inner": (function, function)},
    {"options": {"max_autotune": True}},
    {"options": {"max_autotune": False}},
    {"seed": 0},
    {"strict": True},
]


def test_unused_backends_are_equal_exactly_if_their_configurations_are() -> None:
    for i, first in enumerate(DIFFERENT):
        for j, second in enumerate(DIFFERENT):
            a, b = make_backend(**first), make_backend(**second)
            assert (a == b) == (i == j), (first, second)
            if i == j:
                assert hash(a) == hash(b)


def test_the_spelling_and_order_of_options_do_not_matter() -> None:
    first = dropbp_backend(options={"max-autotune": True, "epilogue_fusion": False})
    assert first == dropbp_backend(options={"epilogue_fusion": False, "max_autotune": True})


def test_a_backend_equals_nothing_else() -> None:
    assert dropbp_backend() != "dropbp"
    assert dropbp_backend() != None  # noqa: E711
    assert dropbp_backend() in {dropbp_backend(): 1}


def test_a_used_backend_equals_itself_alone() -> None:
    first, second = dropbp_backend(inner="aot_eager"), dropbp_backend(inner="aot_eager")
    before = hash(first)
    torch.compile(Residual(), backend=first)(torch.randn(2, 4))
    assert hash(first) == before
    assert first == first
    assert first != second
    assert second != first


def test_an_unused_backend_whose_rate_was_changed_equals_none_of_the_old_rate() -> None:
    first, second = dropbp_backend(0.5), dropbp_backend(0.5)
    first.rate = 0.1
    assert first != second
    second.rate = 0.1
    assert first == second
    assert hash(first) == hash(second)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_copies_share_policy_and_equal_the_original(duplicate: Callable[[DropBPBackend], DropBPBackend]) -> None:
    original = dropbp_backend(0.5, seed=0)
    copied = duplicate(original)
    assert copied is not original
    assert copied == original
    assert hash(copied) == hash(original)
    original.rate = 0.1
    assert copied.rate == 0.1
    assert copied.__name__ == original.__name__
    nested = duplicate({"backend": original})["backend"]
    assert nested == original


@pytest.mark.parametrize("arguments", DIFFERENT, ids=lambda arguments: "-".join(arguments))
def test_a_pickled_unused_backend_is_an_equal_and_independent_one(arguments: dict[str, Any]) -> None:
    original = make_backend(**arguments)
    copied = pickle.loads(pickle.dumps(original))
    assert copied == original
    assert hash(copied) == hash(original)
    assert repr(copied) == repr(original)
    assert copied.state_dict() == original.state_dict()
    original.rate = 0.125
    assert copied.rate == arguments.get("rate", 0.5)


def test_a_pickled_backend_keeps_a_rate_that_was_changed() -> None:
    original = dropbp_backend(0.5, seed=3)
    original.rate = 0.125
    assert pickle.loads(pickle.dumps(original)).rate == 0.125
