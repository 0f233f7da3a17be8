"""Every private PyTorch hook this package cannot avoid, gathered in one file.

Checked on torch 2.11, 2.13 and 2.15. When a new release breaks something, the break is here: the rest of the package
uses public APIs and the functions below.

| hook | why it is needed |
| --- | --- |
| ``torch._inductor.compile_fx.compile_fx`` with ``joint_custom_pre_pass`` | prune the joint graph before partitioning |
| ``torch._dynamo.backends.common.aot_autograd`` | the same for any other pair of forward/backward compilers |
| ``torch._dynamo.convert_frame.compile_lock`` | threads must not trace at the same time |
| ``torch._dynamo.convert_frame.register_bytecode_hook`` | notice an optimizer step that is compiled for each pattern |
| ``torch.compiler._is_compiling_flag`` | other threads may call compiled functions while a variant is traced |
| ``torch._inductor.decomposition.select_decomp_table`` | predict what Inductor's variants save for the backward |
| ``torch._functorch.config.force_non_lazy_backward_lowering`` | a variant's backward is compiled with it |
| ``torch._functorch.config.activation_memory_budget`` | the backend's parameter of that name |
| ``torch._functorch.config.donated_buffer`` | calibration runs a region's backward once for each branch above it |
| ``torch._dispatch.python.enable_python_dispatcher`` | run fake tensors with symbolic sizes |
| ``torch._subclasses`` fake tensor mode, fake copying | explain a model on a copy that has no data |
| ``torch._dynamo`` code tracker, ``reset_code``, counters | an explanation leaves Dynamo's caches as they were |
| ``torch._guards`` tracing context | compile regions apart from each other and after Dynamo has finished |
| ``torch._higher_order_ops.register_hook`` (2.13 and later) | hooks that a forward puts on its own tensors |
| ``torch._logging._internal.trace_structured`` | graphs show up in tlparse |
| ``torch._C._current_graph_task_id`` | a forward inside a backward is a recomputation, not a new step |
| ``torch.utils.checkpoint`` hooks and their frames | a recomputed forward is told which one it repeats |
| ``torch.utils._python_dispatch._disable_current_modes`` | a variant is compiled apart from the user's dispatch modes |
| ``torch._C._autograd._get_current_graph_task_keep_graph`` | an observed step keeps its regions' graphs if it must |
| ``torch.autograd.forward_ad._current_level`` | forward-mode AD is refused, cheaply, rather than left without a tangent |
| ``torch._foreach_norm`` | the norms of many gradients, sharded ones among them, in one call and without communication |
| ``torch._dynamo`` sources, scopes and guards | ``eval()`` must reach a graph that never read ``module.training`` |
| ``torch._dynamo`` reasons for breaks, ``grapharg`` | warnings name the breaks that hide branches |
| ``OptimizedModule``, ``Module._compiled_call_impl`` | layers that are compiled one by one are told from a whole model |
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import fx
from torch.autograd import forward_ad

#: What AOTAutograd hands a compiler: a flat graph and its inputs; what it wants back: a callable.
Compiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
#: A rewrite of a joint forward/backward graph, in place.
JointPass = Callable[[fx.Graph], None]


@contextlib.contextmanager
def fresh_tracing_context(fake_mode: Any) -> Iterator[None]:
    """Give one region its own tracing context: AOTAutograd writes per-graph metadata into the current one, and a
    variant compiled after Dynamo has returned has none. Such a variant may also be compiled under the user's dispatch modes
    (a selective checkpoint's, for one), which Dynamo takes off before it calls a backend.
    """
    from torch._guards import TracingContext, tracing
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), tracing(TracingContext(fake_mode)), _known_to_compile():
        yield


@contextlib.contextmanager
def _known_to_compile() -> Iterator[None]:
    """Say that this is a compilation, as Dynamo does during its own: another thread that calls a compiled function meanwhile
    would be told that it must not be traced symbolically. Under :func:`compile_lock`, as Dynamo's are.
    """
    compiler: Any = torch.compiler
    before = compiler._is_compiling_flag
    compiler._is_compiling_flag = True
    try:
        yield
    finally:
        compiler._is_compiling_flag = before


@contextlib.contextmanager
def fake_execution(fake_mode: Any) -> Iterator[None]:
    """Run operators on fake tensors as Dynamo does: without the Python dispatcher, composite operators of older releases
    specialise symbolic sizes; and hooks on saved tensors are the user's, not to be shown fake ones.
    """
    from torch._dispatch.python import enable_python_dispatcher

    hide_hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with fake_mode, enable_python_dispatcher(), hide_hooks:
        yield


def compile_lock() -> contextlib.AbstractContextManager[Any]:
    """The lock under which Dynamo compiles: tracing and its configuration are global, so a variant that is compiled
    from a running forward must not overlap with another thread's compilation.
    """
    from torch._dynamo.convert_frame import compile_lock as lock

    return lock


def on_compiled(look: Callable[[Any], None]) -> Any:
    """Call ``look`` with each code object that Dynamo has compiled, until the handle's ``remove()``."""
    from torch._dynamo.convert_frame import register_bytecode_hook

    return register_bytecode_hook(lambda code, _: look(code))


def fake_mode_of(values: Iterable[Any]) -> Any:
    """The fake tensor mode that Dynamo traced ``values`` in.

    Not the tracing context's: Dynamo gives backends a new one, for backends that make fake tensors of their own.
    """
    from torch._subclasses import FakeTensor

    for value in values:
        if isinstance(value, FakeTensor):
            return value.fake_mode
        if isinstance(value, torch.Tensor) and torch.utils._python_dispatch.is_traceable_wrapper_subclass(value):
            names, _ = value.__tensor_flatten__()
            return fake_mode_of([getattr(value, name) for name in names])
    return None


def new_fake_mode() -> Any:
    """A mode whose tensors have sizes, strides and types but no data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_copying(fake_mode: Any) -> contextlib.AbstractContextManager[Any]:
    """Within the block ``copy.deepcopy`` makes fake copies of tensors."""
    from torch._subclasses.fake_tensor import FakeCopyMode

    return cast("contextlib.AbstractContextManager[Any]", FakeCopyMode(fake_mode))


def fake_twin(tensor: torch.Tensor, fake_mode: Any) -> torch.Tensor:
    """A fake tensor (parameter) like ``tensor``, of its device, or the CPU where it is on the meta device."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        twin = fake_mode.from_tensor(tensor)
        return cast("torch.Tensor", twin)
    device = torch.device("cpu") if tensor.is_meta else tensor.device
    with fake_mode, torch.no_grad():
        if tensor.layout is torch.strided:
            data = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
        else:
            data = torch.empty_like(tensor, device=device)
        if isinstance(tensor, torch.nn.Parameter):
            return torch.nn.Parameter(data, requires_grad=tensor.requires_grad)
        return data.requires_grad_(tensor.requires_grad)


@contextlib.contextmanager
def isolated_dynamo() -> Iterator[None]:
    """Compilations within the block leave nothing behind on the code objects that Dynamo meets there first, and count
    neither in Dynamo's statistics nor in its random state.
    """
    from torch._dynamo import convert_frame, eval_frame
    from torch._dynamo.utils import preserve_rng_state

    before = {id(code) for code in _tracked_codes(convert_frame)}
    try:
        with preserve_rng_state(), _uncounted():
            yield
    finally:
        for code in _tracked_codes(convert_frame):
            if id(code) not in before:
                eval_frame.reset_code(code)


@contextlib.contextmanager
def _uncounted() -> Iterator[None]:
    """What is traced to be looked at does not count in PyTorch's statistics of compilations."""
    from torch._dynamo.utils import counters

    counted = {name: collections.Counter(values) for name, values in counters.items()}
    try:
        yield
    finally:
        counters.clear()
        for name, values in counted.items():
            counters[name].update(values)


def is_cut_by_ddp_optimizer(gm: fx.GraphModule) -> bool:
    """Whether a graph is a piece of what Dynamo captured, cut off by its DDPOptimizer."""
    reason = getattr(getattr(gm, "compile_subgraph_reason", None), "reason", "")
    return "DDPOptimizer" in reason


@contextlib.contextmanager
def unseen_by_ddp_optimizer(gm: fx.GraphModule) -> Iterator[None]:
    """Within the block AOTAutograd may compile code for a piece of a graph, not all of it.

    Where DDPOptimizer sees that it ran, it takes the backend's result for AOTAutograd's own: that runs on fake tensors when
    called first, and leaves its metadata behind.
    """
    from torch._dynamo.utils import counters

    before = counters["aot_autograd"]["total"]
    try:
        yield
    finally:
        if is_cut_by_ddp_optimizer(gm):
            counters["aot_autograd"]["total"] = before


def _tracked_codes(convert_frame: Any) -> list[Any]:
    tracked = [*convert_frame.input_codes.seen, *convert_frame.output_codes.seen]
    return [code for code in (reference() for reference in tracked) if code is not None]


def joint_graph_pass(rewrite: JointPass, cache_key: str) -> Any:
    """Wrap ``rewrite`` as an Inductor pass whose ``uuid`` keeps the on-disk caches from mixing variants up."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class JointGraphPass(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            rewrite(graph)

        def uuid(self) -> str:
            return cache_key

    return JointGraphPass()


def _backward_compiled_at_once(wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """AOTAutograd puts compiling a backward off until it first runs; a variant that counts as compiled must not."""
    if not wanted:
        return contextlib.nullcontext()
    from torch._functorch import config

    return cast("contextlib.AbstractContextManager[Any]", config.patch(force_non_lazy_backward_lowering=True))


def repeatable_backward(wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """What is compiled within, if ``wanted``, may run its backward several times: it must not overwrite saved tensors.

    Runs that keep the graph must be within as well: compiled code looks at the setting again before it runs.
    """
    if not wanted:
        return contextlib.nullcontext()
    from torch._functorch import config

    return cast("contextlib.AbstractContextManager[Any]", config.patch(donated_buffer=False))


class BoxedCode:
    """Compiled code as a function of a list, which it empties.

    Inductor does some bookkeeping around its first call; from the second on what it compiled is called directly.
    """

    __slots__ = ("_call", "_settled")

    def __init__(self, code: Any) -> None:
        from functorch.compile import make_boxed_func

        self._call = code if getattr(code, "_boxed_call", False) else make_boxed_func(code)
        self._settled = False

    def __call__(self, arguments: list[Any]) -> Sequence[Any]:
        made: Sequence[Any] = self._call(arguments)
        if not self._settled:
            self._call, self._settled = getattr(self._call, "current_callable", None) or self._call, True
        return made


class TangentLike(NamedTuple):
    """What a gradient that compiled code takes looks like."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def activation_memory_budget(budget: float | None) -> contextlib.AbstractContextManager[Any]:
    """What is partitioned within saves no more than this share of what it would; the rest is recomputed."""
    if budget is None:
        return contextlib.nullcontext()
    from torch._functorch import config

    return cast("contextlib.AbstractContextManager[Any]", config.patch(activation_memory_budget=budget))


@dataclasses.dataclass(frozen=True)
class FlatCode:
    """A compiled graph and its compiled backward as the inner compiler made them, without AOTAutograd's wrappers.

    Both take a list, which they empty, and return a sequence. The forward returns its outputs and then what its backward
    needs; the backward takes that and then the tangents, and returns a gradient, or ``None``, for each input.

    Attributes:
        forward: the compiled forward.
        backward: the compiled backward, ``None`` for a graph in which nothing requires a gradient.
        unsafe_views: outputs that share memory with a value that the backward may need.
        tangents: outputs whose gradients the backward takes.
        tangent_like: what each of those gradients looks like: size, strides, type and device.
        graded: inputs that the backward returns a gradient for.
        donated: positions in what was saved of the tensors that the backward may write over.
        deterministic: whether deterministic algorithms were asked for when this was compiled.
    """

    forward: BoxedCode
    backward: BoxedCode | None
    unsafe_views: tuple[int, ...] = ()
    tangents: tuple[int, ...] = ()
    tangent_like: tuple[TangentLike, ...] = ()
    graded: tuple[int, ...] = ()
    donated: tuple[int, ...] = ()
    deterministic: bool = False


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What compiling a graph gave.

    Attributes:
        run: the graph as a function of its inputs, with all that AOTAutograd puts around it.
        flat: the code alone, where it needs nothing around it but an autograd node.
    """

    run: Callable[..., Any]
    flat: FlatCode | None


class _Capture:
    """Takes note of what an inner compiler makes while AOTAutograd calls it.

    Args:
        inputs: the graph's, as AOTAutograd gets them: what it says of a graph with subclasses (DTensor) is about the tensors
            inside them.
    """

    def __init__(self, inputs: Sequence[Any]) -> None:
        from torch.utils._python_dispatch import is_traceable_wrapper_subclass

        self._plain_inputs = not any(is_traceable_wrapper_subclass(value) for value in inputs)
        self._forward: Any = None
        self._backward: Any = None
        self._metadata: Any = None
        self._gradients: tuple[bool, ...] = ()
        self._tangents: tuple[tuple[torch.dtype, torch.device], ...] = ()

    def forward(self, code: Any) -> Any:
        self._note_metadata()
        self._forward = code
        return code

    def backward(self, gm: fx.GraphModule, code: Any) -> Any:
        (output,) = (node for node in gm.graph.nodes if node.op == "output")
        self._gradients = tuple(value is not None for value in output.args[0])
        self._note_metadata()
        traced = [] if self._metadata is None else self._metadata.traced_tangents
        self._tangents = tuple((value.dtype, value.device) for value in traced if isinstance(value, torch.Tensor))
        self._backward = code
        return code

    def keep_saved_tensors(self) -> None:
        """The compiled backward writes over nothing that was saved: AOTAutograd need not refuse to run it again."""
        if self._metadata is not None:
            self._metadata.bw_donated_idxs = []

    def _note_metadata(self) -> None:
        from torch._guards import TracingContext

        context = TracingContext.try_get()
        self._metadata = None if context is None else context.fw_metadata

    def flat(self) -> FlatCode | None:
        """The code alone, ``None`` where AOTAutograd has to do something at run time: write mutated inputs back, make
        views of inputs again, wrap subclasses, pass on symbolic sizes, random states or tokens.
        """
        meta = self._metadata
        if self._forward is None or meta is None or not (self._plain_inputs and _is_plain(meta)):
            return None
        if self._backward is None:
            return FlatCode(BoxedCode(self._forward), None)
        carries = [getattr(info, "requires_grad_for_backward", info.requires_grad) for info in meta.output_info]
        tangents = tuple(position for position, carried in enumerate(carries) if carried)
        formats = [getattr(tangent, "memory_format", None) for tangent in meta.subclass_tangent_meta]
        if not len(formats) == len(tangents) == len(self._tangents):
            return None
        like: list[TangentLike] = []
        for known, (dtype, device) in zip(formats, self._tangents, strict=True):
            if known is None or known.size is None:
                return None
            like.append(TangentLike(tuple(known.size), tuple(known.stride), dtype, device))
        if len(self._gradients) != len(meta.input_info) or _saves_more_than_tensors(meta):
            return None
        return FlatCode(
            forward=BoxedCode(self._forward),
            backward=BoxedCode(self._backward),
            unsafe_views=tuple(meta.unsafe_view_out_indices),
            tangents=tangents,
            tangent_like=tuple(like),
            graded=tuple(position for position, gets in enumerate(self._gradients) if gets),
            donated=tuple(meta.bw_donated_idxs or ()),
            deterministic=bool(meta.deterministic),
        )


def _is_plain(meta: Any) -> bool:
    """Whether a graph neither mutates nor returns its inputs, and every value is a tensor of no subclass."""
    from torch._functorch._aot_autograd.schemas import MutationType, PlainTensorMeta

    return (
        all(info.mutation_type == MutationType.NOT_MUTATED for info in meta.input_info)
        and all(issubclass(info.raw_type, torch.Tensor) for info in meta.output_info)
        and not (meta.num_outputs_aliased or meta.num_intermediate_bases or meta.tokens or meta.num_backward_tokens)
        and not (meta.is_rng_op_functionalized or meta.num_graphsafe_rng_states or meta.dynamic_outputs)
        and meta.grad_enabled_mutation is None
        and all(
            isinstance(known, PlainTensorMeta)
            for known in (*meta.subclass_inp_meta, *meta.subclass_fw_graph_out_meta, *meta.subclass_tangent_meta)
        )
    )


def _saves_more_than_tensors(meta: Any) -> bool:
    return bool(
        meta.num_symints_saved_for_bw
        or meta.num_tensors_saved_with_no_vc_check
        or meta.num_opaque_objects_saved_for_bw
        or meta.indices_of_inputs_that_requires_grad_with_mutations_in_bw
    )


def autocast_is_on() -> bool:
    """Whether any device's autocast is on."""
    return bool(torch._C._is_any_autocast_enabled())


def without_autocast() -> contextlib.AbstractContextManager[Any]:
    """Compiled code has its casts in it already."""
    return cast("contextlib.AbstractContextManager[Any]", torch._C._DisableAutocast())


def compile_with_inductor(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    options: Mapping[str, Any],
    joint_pass: JointPass | None,
    cache_key: str,
    flat: bool,
) -> Compiled:
    """Compile ``gm`` (which must return a tuple) with TorchInductor; ``flat`` asks for the code alone too."""
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    patches = dict(options)
    if joint_pass is not None:
        # Inductor's own key does not tell code that overwrites saved tensors from code that must not.
        patches["joint_custom_pre_pass"] = joint_graph_pass(joint_pass, f"{cache_key}:{config.donated_buffer}")
    if not flat:
        return Compiled(cast("Callable[..., Any]", compile_fx(gm, list(inputs), config_patches=patches)), None)
    capture = _Capture(inputs)

    def compile_inner(graph: fx.GraphModule, examples: Sequence[Any], **kwargs: Any) -> Any:
        code = compile_fx_inner(graph, examples, **kwargs)
        return capture.backward(graph, code) if kwargs.get("is_backward") else capture.forward(code)

    # AOTAutograd's own cache would answer without calling the inner compiler; Inductor's stays.
    with _backward_compiled_at_once(joint_pass is not None), config.patch(enable_autograd_cache=False):
        run = compile_fx(gm, list(inputs), inner_compile=compile_inner, config_patches=patches)
    return Compiled(cast("Callable[..., Any]", run), capture.flat())


def compile_with_aot_autograd(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    forward: Compiler,
    backward: Compiler,
    joint_pass: JointPass | None,
) -> Compiled:
    """Compile ``gm`` with AOTAutograd and a pair of compilers for its forward and its backward graph."""
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    def partition(joint: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        if joint_pass is not None:
            joint_pass(joint.graph)
            joint.recompile()
        forward_graph, backward_graph = min_cut_rematerialization_partition(joint, joint_inputs, **kwargs)
        return forward_graph, backward_graph

    capture = _Capture(inputs)

    def compile_backward(graph: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        return cast("Callable[..., Any]", capture.backward(graph, backward(graph, examples)))

    backend = aot_autograd(
        fw_compiler=lambda graph, examples: capture.forward(forward(graph, examples)),
        bw_compiler=compile_backward,
        partition_fn=partition,
        keep_inference_input_mutations=True,
    )
    with _backward_compiled_at_once(joint_pass is not None):
        run = backend(gm, list(inputs))
    if backward is run_graph_eagerly:
        capture.keep_saved_tensors()
    return Compiled(run, capture.flat())


@dataclasses.dataclass(frozen=True)
class TracedGraphs:
    """What AOTAutograd makes of a graph: the joint graph, and the two that the partitioner splits it into.

    Attributes:
        joint: the joint graph as the partitioner gets it.
        forward: returns ``outputs`` values of its own, then what is saved for the backward.
        backward: takes what was saved, then the tangents.
        outputs: how many outputs of ``forward`` are its own.
    """

    joint: fx.GraphModule
    forward: fx.GraphModule
    backward: fx.GraphModule
    outputs: int


class _Traced(Exception):
    """Ends a compilation that was for its graphs only."""


def trace_joint_graph(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule | None:
    """The joint forward/backward graph of ``gm``, ``None`` where nothing in it requires a gradient."""
    found: list[fx.GraphModule] = []

    def stop(joint: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        found.append(joint)
        raise _Traced

    _trace_until(gm, inputs, partition=stop)
    return found[0] if found else None


def trace_graphs(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    joint_pass: JointPass | None,
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
) -> TracedGraphs | None:
    """The graphs of ``gm`` after ``joint_pass``, ``None`` where nothing in it requires a gradient.

    ``decompositions`` are applied while tracing, as a compiler does that has some: they decide what is saved.
    """
    from functorch.compile import min_cut_rematerialization_partition

    found: list[TracedGraphs] = []

    def stop(joint: fx.GraphModule, joint_inputs: Any, *, num_fwd_outputs: int, **kwargs: Any) -> Any:
        if joint_pass is not None:
            joint_pass(joint.graph)
            joint.recompile()
        forward, backward = min_cut_rematerialization_partition(
            joint, joint_inputs, num_fwd_outputs=num_fwd_outputs, **kwargs
        )
        found.append(TracedGraphs(joint, forward, backward, num_fwd_outputs))
        raise _Traced

    _trace_until(gm, inputs, partition=stop, decompositions=decompositions)
    return found[0] if found else None


def trace_forward_graph(
    gm: fx.GraphModule, inputs: Sequence[Any], decompositions: Mapping[Any, Callable[..., Any]] | None = None
) -> fx.GraphModule:
    """The ATen graph of ``gm`` when no gradient is recorded."""
    found: list[fx.GraphModule] = []

    def stop(graph: fx.GraphModule, _inputs: Any) -> Any:
        found.append(graph)
        raise _Traced

    with torch.no_grad():
        _trace_until(gm, inputs, forward=stop, decompositions=decompositions)
    return found[0]


def _trace_until(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    forward: Callable[..., Any] | None = None,
    partition: Callable[..., Any] | None = None,
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
) -> None:
    from functorch.compile import default_partition
    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(
        fw_compiler=forward or run_graph_eagerly,
        bw_compiler=run_graph_eagerly,
        partition_fn=partition or default_partition,
        decompositions=decompositions,
    )
    with contextlib.suppress(_Traced), _uncounted():
        backend(gm, list(inputs))


def inductor_decompositions() -> Mapping[Any, Callable[..., Any]]:
    """What Inductor takes operators apart into before it partitions."""
    from torch._inductor.decomposition import select_decomp_table

    return cast("Mapping[Any, Callable[..., Any]]", select_decomp_table())


def run_graph_eagerly(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """The inner compiler of ``inner="aot_eager"``: run the traced graph as it is, freeing inputs as it goes."""
    from torch._dynamo.backends.debugging import boxed_nop

    return boxed_nop(gm, list(inputs))


def inductor_option_names() -> frozenset[str]:
    """Names that ``torch.compile(options=...)`` accepts for Inductor."""
    from torch._inductor import config

    return frozenset(config.get_config_copy())


def inductor_mode_options(mode: str) -> dict[str, Any]:
    """The Inductor options that ``torch.compile(mode=...)`` stands for."""
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode))


def _source_name(source: Any) -> str:
    name = source.name  # a method in older releases, a property since
    return str(name() if callable(name) else name)


class Owned(NamedTuple):
    """A parameter or buffer as a graph input: the outermost module it was reached through, and itself, if it can be told."""

    module: torch.nn.Module
    value: Any


def outermost_modules(placeholders: Sequence[fx.Node]) -> dict[fx.Node, Owned]:
    """Find for each parameter or buffer the outermost module it was reached through, and guard on its training mode.

    Dynamo guards on ``module.training`` only where the traced code reads it. A graph that never did would go on
    dropping after ``model.eval()``; so a guard on that flag is installed here for each outermost module, and flipping it
    makes Dynamo compile again, as it does for a model with dropout. Placeholders that belong to no module are left out.

    Must be called while Dynamo is compiling (inside a backend); elsewhere it returns an empty mapping.
    """
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.source import AttrSource
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._guards import TracingContext

    if TracingContext.try_get() is None:
        return {}
    try:
        output = InstructionTranslator.current_tx().output
    except AttributeError:  # thread-local not set: not inside Dynamo
        return {}
    scope = {"L": output.local_scope, "G": output.global_scope}
    values: dict[str, Any] = {}

    def evaluate(name: str) -> Any:
        if name not in values:
            try:
                values[name] = eval(name, scope)
            except Exception:  # an expression that only Dynamo's guards can evaluate
                values[name] = None
        return values[name]

    guarded: set[str] = set()
    found: dict[fx.Node, Owned] = {}
    for node in placeholders:
        own = source = getattr(node.meta.get("grapharg"), "source", None)
        outermost: tuple[Any, torch.nn.Module] | None = None
        while source is not None:
            module = evaluate(_source_name(source))
            if isinstance(module, torch.nn.Module):
                outermost = (source, module)
            source = getattr(source, "base", None)
        if outermost is None:
            continue
        source, module = outermost
        name = _source_name(source)
        if name not in guarded:
            guarded.add(name)
            install_guard(AttrSource(source, "training").make_guard(GuardBuilder.EQUALS_MATCH))
        found[node] = Owned(module, evaluate(_source_name(own)))
    return found


def calling_modules() -> tuple[torch.nn.Module, ...]:
    """The modules that this thread is calling at this point, innermost first."""
    found: list[torch.nn.Module] = []
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is torch.nn.Module.__call__.__code__:
            found.append(frame.f_locals["self"])
        frame = frame.f_back
    return tuple(found)


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether ``module.compile()`` was called, or ``module`` is what ``torch.compile`` made of a module."""
    from torch._dynamo import OptimizedModule

    return isinstance(module, OptimizedModule) or getattr(module, "_compiled_call_impl", None) is not None


class GraphBreak(NamedTuple):
    """Where Dynamo ended a graph before the code did, and its reason in one line."""

    place: str
    reason: str


def graph_break_after(gm: fx.GraphModule) -> GraphBreak | None:
    """The break that ends a graph from Dynamo, ``None`` if the code that it captured ends there."""
    known = getattr(gm, "compile_subgraph_reason", None)
    if known is None or not getattr(known, "graph_break", False):
        return None
    stack = list(getattr(known, "user_stack", None) or ())
    place = f"{stack[-1].filename}:{stack[-1].lineno}" if stack else "a place that Dynamo does not tell"
    return GraphBreak(place, next(iter(str(known.reason).strip().splitlines()), "").strip().rstrip("."))


def given_value(placeholder: fx.Node) -> Any:
    """The tensor that a graph from Dynamo is about to be called with for an input, ``None`` where it cannot be told."""
    try:
        return placeholder.meta["grapharg"].example
    except (KeyError, AttributeError, AssertionError):  # an input of a backend's own, or one that was let go of
        return None


def ddp_waits_for_every_gradient() -> bool:
    """Whether the present forward is that of a DistributedDataParallel that cannot do without any gradient."""
    from torch.nn.parallel import DistributedDataParallel

    ddp = DistributedDataParallel._get_active_ddp_module()
    if ddp is None or not ddp.require_backward_grad_sync or getattr(ddp, "_use_python_reducer", False):
        return False
    return bool(ddp.static_graph or not ddp.find_unused_parameters)


def process_group_store(group: Any) -> Any:
    """The key-value store that a process group was made with."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_process_group_store(group)


def norms(tensors: Sequence[torch.Tensor], order: float) -> Sequence[torch.Tensor]:
    """The ``order``-norm of each tensor. Those of DTensors are of their shards, still to be reduced."""
    found: Sequence[torch.Tensor] = torch._foreach_norm(list(tensors), order)
    return found


def in_backward() -> bool:
    """Whether this thread is running an autograd backward pass."""
    return bool(torch._C._current_graph_task_id() != -1)


def keeps_graph() -> bool:
    """Whether the autograd backward pass this thread is running was asked to keep the graph."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def has_tangents(values: Iterable[Any]) -> bool:
    """Whether forward-mode AD is to follow one of the values."""
    return any(
        isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None for value in values
    )


def forward_ad_is_on() -> bool:
    """Whether this is within a level of forward-mode AD, where tensors may have tangents."""
    return forward_ad._current_level >= 0


def saved_tensor_hooks_are_set() -> bool:
    """Whether tensors saved for the backward now go through somebody's hooks."""
    return bool(torch._C._autograd._top_saved_tensors_default_hooks(True))


# ---- fully_shard -----------------------------------------------------------------------------------------------------


def leave_out_unneeded_gathers(module: torch.nn.Module) -> None:
    """Let the groups of parameters of ``module``, one that ``fully_shard`` took, gather for a backward only what it reads.

    A forward's graph refers to what its backward needs: to a tensor that it saved, to the storage of a view of one, to the
    node that accumulates a parameter's gradient. A group to whose parameters the forward has left no reference more than
    there was before it is not gathered again, and other groups do not prefetch it.
    """
    state = module._get_fsdp_state()  # type: ignore[operator]
    groups = getattr(state, "_fsdp_param_groups", None)  # several since torch 2.12
    if groups is None:
        groups = [group for group in [state._fsdp_param_group] if group is not None]
    for group in groups:
        if not hasattr(group, "dropbp_gathers"):
            group.dropbp_gathers = _Gathers(group)


class _Gathers:
    """Stands between a group of sharded parameters and the hooks of its module."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self._needed: list[bool] = []  # for each forward that waits for its backward
        self._before: list[tuple[int, int]] = []
        for name in ("pre_forward", "post_forward", "pre_backward", "finalize_backward"):
            setattr(self, f"_{name}", getattr(group, name))
            setattr(group, name, getattr(self, name))

    def pre_forward(self, *arguments: Any, **named: Any) -> Any:
        found = self._pre_forward(*arguments, **named)  # type: ignore[attr-defined]
        self._before = self._references()
        return found

    def post_forward(self, *arguments: Any, **named: Any) -> Any:
        group = self._group
        records = len(group._post_forward_indices)
        found = self._post_forward(*arguments, **named)  # type: ignore[attr-defined]
        if len(group._post_forward_indices) == records or not torch.is_grad_enabled():
            return found  # a checkpoint's recomputation, or no backward will follow
        # Under hooks on saved tensors the graph refers to what the hooks made of them.
        needed = not group.is_sharded or saved_tensor_hooks_are_set() or self._references() != self._before
        self._needed.append(needed)
        if not needed:
            group._post_forward_indices.pop()
            group.comm_ctx.post_forward_order.pop()
        return found

    def pre_backward(self, *arguments: Any, **named: Any) -> Any:
        group = self._group
        state = type(group._training_state).PRE_BACKWARD
        if self._needed and group._training_state != state:  # later outputs of one forward change nothing
            skips = not any(self._needed)  # of several forwards it is not known which one's backward this is
            self._needed.pop()
            if skips:
                group._training_state = state
                return None
        return self._pre_backward(*arguments, **named)  # type: ignore[attr-defined]

    def finalize_backward(self, *arguments: Any, **named: Any) -> Any:
        self._needed.clear()
        return self._finalize_backward(*arguments, **named)  # type: ignore[attr-defined]

    def _references(self) -> list[tuple[int, int]]:
        """For each parameter how many references there are to it and to its storage, those of Python counting once."""
        whole = [p._unsharded_param for p in self._group.fsdp_params if hasattr(p, "_unsharded_param")]
        return [(p._use_count(), torch._C._storage_Use_Count(p.untyped_storage()._cdata)) for p in whole]


@dataclasses.dataclass(frozen=True)
class CheckpointCall:
    """One non-reentrant ``torch.utils.checkpoint`` that is running, or running again inside a backward.

    Attributes:
        frame: what PyTorch knows the checkpoint by, the same object for the forward and all its recomputations.
        run: tells its runs apart.
        recomputes: whether this is a recomputation.
    """

    frame: Any
    run: Any
    recomputes: bool


def running_checkpoints() -> tuple[CheckpointCall, ...]:
    """The non-reentrant checkpoints around this point of this thread, innermost first.

    Raises:
        RuntimeError: PyTorch's checkpoints do not look as they did in the releases this was written for.
    """
    autograd: Any = torch._C._autograd
    stack: list[tuple[Any, Any]] = []
    try:
        while saved_tensor_hooks_are_set():
            stack.append(autograd._top_saved_tensors_default_hooks(True))
            autograd._pop_saved_tensors_default_hooks()
    finally:
        for pack, unpack in reversed(stack):
            autograd._push_saved_tensors_default_hooks(pack, unpack)
    return tuple(call for pack, _ in stack if (call := _checkpoint_call(pack)) is not None)


def _checkpoint_call(pack: Any) -> CheckpointCall | None:
    """The checkpoint whose hook packs saved tensors, ``None`` if it is somebody else's hook."""
    name = getattr(pack, "__qualname__", "")
    recomputes = "_recomputation_hook." in name
    if not recomputes and "_checkpoint_hook." not in name:
        return None
    own = inspect.unwrap(pack)
    cells = dict(zip(own.__code__.co_freevars, own.__closure__ or (), strict=True))
    cell = cells.get("target_frame_ref" if recomputes else "frame")
    frame = None if cell is None else cell.cell_contents() if recomputes else cell.cell_contents
    if frame is None:
        raise RuntimeError(
            f"torch {torch.__version__} does not say which torch.utils.checkpoint a compiled block is run in, so the "
            "pattern of its forward cannot be repeated when it is recomputed. Compile the model with the checkpoints inside."
        )
    return CheckpointCall(frame, own, recomputes)


def checkpoint_operator() -> Any:
    """The higher-order operator Dynamo puts around a layer under activation checkpointing."""
    return torch.ops.higher_order.tag_activation_checkpoint


def register_hook_operator() -> Any:
    """The higher-order operator Dynamo traces a forward's ``tensor.register_hook`` into, ``None`` in releases that break the
    graph there instead.
    """
    try:
        from torch._higher_order_ops.register_hook import register_hook_op
    except ImportError:
        return None
    return register_hook_op


def structured_trace_is_on() -> bool:
    """Whether somebody reads PyTorch's structured trace: ``TORCH_TRACE`` is set, or a handler was added."""
    from torch._logging import _internal

    return any(getattr(handler, "root_dir", "elsewhere") is not None for handler in _internal.trace_log.handlers)


def structured_trace_artifact(name: str, text: str) -> None:
    """Put a text into PyTorch's structured trace, where tlparse finds it."""
    from torch._logging._internal import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=lambda: text)


#: Private hooks by module and attribute, for ``dropbp-fx doctor``.
_HOOKS = (
    ("torch._inductor.compile_fx", "compile_fx"),
    ("torch._inductor.custom_graph_pass", "CustomGraphPass"),
    ("torch._inductor.config", "joint_custom_pre_pass"),
    ("torch._inductor.decomposition", "select_decomp_table"),
    ("torch._dynamo.backends.common", "aot_autograd"),
    ("torch._dynamo.convert_frame", "compile_lock"),
    ("torch.compiler", "_is_compiling_flag"),
    ("torch._dynamo.convert_frame", "input_codes"),
    ("torch._dynamo.convert_frame", "register_bytecode_hook"),
    ("torch._dynamo.eval_frame", "reset_code"),
    ("torch._dynamo", "OptimizedModule"),
    ("torch._dynamo.output_graph", "GraphCompileReason"),
    ("torch._dynamo.guards", "install_guard"),
    ("torch._dynamo.source", "AttrSource"),
    ("torch._dynamo.symbolic_convert", "InstructionTranslator"),
    ("torch", "_foreach_norm"),
    ("torch.autograd.forward_ad", "_current_level"),
    ("torch.distributed.distributed_c10d", "_get_process_group_store"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel"),
    ("torch._dispatch.python", "enable_python_dispatcher"),
    ("torch._functorch.config", "force_non_lazy_backward_lowering"),
    ("torch._guards", "TracingContext"),
    ("torch._logging._internal", "trace_structured"),
    ("torch._subclasses.fake_tensor", "FakeCopyMode"),
    ("torch.utils._python_dispatch", "_disable_current_modes"),
    ("torch._C", "_current_graph_task_id"),
    ("torch._C._autograd", "_top_saved_tensors_default_hooks"),
    ("torch._C", "_storage_Use_Count"),
    ("torch.distributed.fsdp._fully_shard._fsdp_param_group", "FSDPParamGroup"),
    ("torch.utils.checkpoint", "_checkpoint_hook"),
    ("torch.utils.checkpoint", "_recomputation_hook"),
    ("functorch.compile", "min_cut_rematerialization_partition"),
)


def hooks() -> dict[str, bool]:
    """For each private hook whether this PyTorch has it."""
    found: dict[str, bool] = {}
    for module, attribute in _HOOKS:
        try:
            found[f"{module}.{attribute}"] = hasattr(importlib.import_module(module), attribute)
        except ImportError:
            found[f"{module}.{attribute}"] = False
    return found


def versions() -> dict[str, str]:
    """Versions of the packages that decide what compiled code looks like."""
    found = {"torch": str(torch.__version__)}
    for name in ("triton", "transformers"):
        with contextlib.suppress(ImportError):
            found[name] = str(importlib.import_module(name).__version__)
    return found
