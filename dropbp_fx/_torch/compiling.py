"""Compiling a graph with Inductor, or with AOTAutograd and any pair of compilers.

| hook | why it is needed |
| --- | --- |
| ``torch._inductor.compile_fx.compile_fx`` with ``joint_custom_pre_pass`` | prune the joint graph before partitioning |
| ``torch._dynamo.backends.common.aot_autograd`` | the same for any other pair of forward/backward compilers |
| ``torch._inductor`` option ``custom_partitioner_fn`` | partition so that a memory budget changes no gradient |
| ``torch._dynamo.backends.debugging.boxed_nop`` | run a traced graph as it is |
| ``torch._functorch.config.force_non_lazy_backward_lowering`` | a variant's backward is compiled with it |
| ``torch._functorch.config.donated_buffer`` | calibration runs a region's backward once for each branch above it |
| ``torch._functorch.config.enable_autograd_cache`` | that cache would answer without the code that is to be captured |
| ``torch._inductor`` options and modes | the backend's ``options`` are Inductor's |
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import fx

from dropbp_fx._torch.flat_code import Capture, Compiled
from dropbp_fx._torch.partitioning import partition

#: What AOTAutograd hands a compiler: a flat graph and its inputs; what it wants back: a callable.
CompileFunction = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


#: A rewrite of a joint forward/backward graph, in place.
JointPass = Callable[[fx.Graph], None]


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

    from dropbp_fx._torch.inductor_partitioner import with_partitioner

    patches = with_partitioner(options)
    if joint_pass is not None:
        # Inductor's own key does not tell code that overwrites saved tensors from code that must not.
        patches["joint_custom_pre_pass"] = joint_graph_pass(joint_pass, f"{cache_key}:{config.donated_buffer}")
    if not flat:
        return Compiled(cast("Callable[..., Any]", compile_fx(gm, list(inputs), config_patches=patches)), None)
    capture = Capture(inputs)

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
    forward: CompileFunction,
    backward: CompileFunction,
    joint_pass: JointPass | None,
) -> Compiled:
    """Compile ``gm`` with AOTAutograd and a pair of compilers for its forward and its backward graph."""
    from torch._dynamo.backends.common import aot_autograd

    def prune_and_partition(
        joint: fx.GraphModule, joint_inputs: Any, **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        if joint_pass is not None:
            joint_pass(joint.graph)
            joint.recompile()
        return partition(joint, joint_inputs, **kwargs)

    capture = Capture(inputs)

    def compile_backward(graph: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        return cast("Callable[..., Any]", capture.backward(graph, backward(graph, examples)))

    backend = aot_autograd(
        fw_compiler=lambda graph, examples: capture.forward(forward(graph, examples)),
        bw_compiler=compile_backward,
        partition_fn=prune_and_partition,
        keep_inference_input_mutations=True,
    )
    with _backward_compiled_at_once(joint_pass is not None):
        run = backend(gm, list(inputs))
    if backward is run_graph_eagerly:
        capture.keep_saved_tensors()
    return Compiled(run, capture.flat())


def run_graph_eagerly(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """The inner compiler of ``inner="aot_eager"``: run the traced graph as it is, freeing inputs as it goes."""
    from torch._dynamo.backends.debugging import boxed_nop

    return boxed_nop(gm, list(inputs))


def inductor_option_names() -> frozenset[str]:
    """Names that ``torch.compile(options=...)`` accepts for Inductor."""
    from torch._inductor import config

    return frozenset(config.get_config_copy())


def inductor_setting(name: str) -> Any:
    """What an Inductor option is where nobody gives it."""
    from torch._inductor import config

    return operator.attrgetter(name)(config)


def inductor_mode_options(mode: str) -> dict[str, Any]:
    """The Inductor options that ``torch.compile(mode=...)`` stands for."""
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode))
