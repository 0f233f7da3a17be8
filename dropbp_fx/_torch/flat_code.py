"""What an inner compiler makes, without AOTAutograd's wrappers.

| hook | why it is needed |
| --- | --- |
| ``torch._guards.TracingContext.fw_metadata`` | whether AOTAutograd has work to do at run time |
| ``torch._functorch._aot_autograd.schemas`` | the same: mutated inputs and subclasses |
| ``functorch.compile.make_boxed_func``, ``_boxed_call`` | call compiled code with a list that it empties |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx


class BoxedCode:
    """Compiled code as a function of a list, which it empties.

    Inductor does some bookkeeping around its first call; from the second on what it compiled is called directly.
    """

    __slots__ = ("_call", "_resolved")

    def __init__(self, code: Any) -> None:
        from functorch.compile import make_boxed_func

        self._call = code if getattr(code, "_boxed_call", False) else make_boxed_func(code)
        self._resolved = False

    @property
    def function(self) -> Any:
        """What is called in the end."""
        return getattr(self._call, "current_callable", None) or self._call

    def __call__(self, arguments: list[Any]) -> Sequence[Any]:
        made: Sequence[Any] = self._call(arguments)
        if not self._resolved:
            self._call, self._resolved = self.function, True
        return made


class TangentLike(NamedTuple):
    """What a gradient that compiled code takes looks like."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


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


class Capture:
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
        self._tangents: tuple[TangentLike, ...] = ()

    def forward(self, code: Any) -> Any:
        self._note_metadata()
        self._forward = code
        return code

    def backward(self, gm: fx.GraphModule, code: Any) -> Any:
        (output,) = (node for node in gm.graph.nodes if node.op == "output")
        self._gradients = tuple(value is not None for value in output.args[0])
        self._note_metadata()
        traced = [] if self._metadata is None else self._metadata.traced_tangents
        self._tangents = tuple(
            TangentLike(tuple(value.size()), tuple(value.stride()), value.dtype, value.device)
            for value in traced
            if isinstance(value, torch.Tensor)
        )
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
        sizes = [size for like in self._tangents for size in (*like.size, *like.stride)]
        if len(tangents) != len(self._tangents) or any(isinstance(size, torch.SymInt) for size in sizes):
            return None
        if len(self._gradients) != len(meta.input_info) or _saves_more_than_tensors(meta):
            return None
        return FlatCode(
            forward=BoxedCode(self._forward),
            backward=BoxedCode(self._backward),
            unsafe_views=tuple(meta.unsafe_view_out_indices),
            tangents=tangents,
            tangent_like=self._tangents,
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
