"""The one registry of what this package uses of PyTorch that PyTorch does not promise to keep.

``dropbp-fx doctor`` looks each of them up; a test holds that no other private name is used. The modules of this room say in
their tables what belongs together.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any, NamedTuple

import torch

#: The releases that every hook was checked on.
CHECKED = ("2.11", "2.13", "2.15")


class Hook(NamedTuple):
    """One private hook.

    Attributes:
        module: where it is.
        attribute: the way from there. The last name may be one that a class sets on its instances, or a function on what it
            makes.
        why: what it is needed for.
        checked: the releases that it was checked on.
        optional: whether releases without it are served in another way.
    """

    module: str
    attribute: str
    why: str
    checked: tuple[str, ...] = CHECKED
    optional: bool = False

    @property
    def name(self) -> str:
        """The hook's full name."""
        return f"{self.module}.{self.attribute}"

    def is_there(self) -> bool:
        """Whether this PyTorch has it."""
        try:
            owner: Any = importlib.import_module(self.module)
        except ImportError:
            return False
        *path, last = self.attribute.split(".")
        for name in path:
            owner = getattr(owner, name, None)
        return hasattr(owner, last) or any(last in names for names in _names_in(owner))


def _names_in(owner: Any) -> Iterator[tuple[str, ...]]:
    """The names that a function, or the functions of a class, use: attributes that are set on instances are among them."""
    for function in [owner, *vars(owner).values()] if inspect.isclass(owner) else [owner]:
        code = getattr(inspect.unwrap(function) if callable(function) else function, "__code__", None)
        if isinstance(code, CodeType):
            yield code.co_names


_TRACE = "variants are compiled apart from Dynamo's own compilation"
_FAKE = "explanations run on tensors without data"
_PARTITION = "joint graphs are pruned before they are partitioned"
_FLAT = "compiled code runs without AOTAutograd's wrappers where it has nothing to do"
_CONFIG = "a setting of one compilation"
_QUIET = "an explanation leaves Dynamo as it was"
_EVAL = "eval() must reach a graph that never read module.training"
_BREAKS = "warnings name the breaks that hide branches"
_LAYERS = "layers compiled one by one are told from a whole model"
_STATE = "what the autograd engine is doing"
_AUTOCAST = "compiled code has its casts in it already"
_CHECKPOINT = "a recomputed forward repeats its pattern"
_SHARDED = "a group that a backward does not read is not gathered for it"
_RANKS = "ranks agree on patterns"
_LOG = "graphs show up in tlparse"
_SWITCH = "switches that Dynamo puts into graphs"
_WORK = "registered operators are told from functions"
_NAMES = "a branch is called the same, whatever wraps its module"
_WRAPPER = "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"
_GROUP = "torch.distributed.fsdp._fully_shard._fsdp_param_group"

#: Every private hook.
HOOKS: tuple[Hook, ...] = (
    Hook("torch._guards", "TracingContext", _TRACE),
    Hook("torch._guards", "tracing", _TRACE),
    Hook("torch.utils._python_dispatch", "_disable_current_modes", _TRACE),
    Hook("torch.utils._python_dispatch", "is_traceable_wrapper_subclass", _FLAT),
    Hook("torch.compiler", "_is_compiling_flag", _TRACE),
    Hook("torch._dispatch.python", "enable_python_dispatcher", _TRACE),
    Hook("torch._dynamo.convert_frame", "compile_lock", "threads must not trace at the same time"),
    Hook("torch._subclasses", "FakeTensor", _FAKE),
    Hook("torch._subclasses.fake_tensor", "FakeTensorMode", _FAKE),
    Hook("torch._subclasses.fake_tensor", "FakeCopyMode", _FAKE),
    Hook("torch.utils._pytree", "tree_map_only", "arguments of any nesting"),
    Hook("torch._inductor.compile_fx", "compile_fx", _PARTITION),
    Hook("torch._inductor.compile_fx", "compile_fx_inner", _FLAT),
    Hook("torch._inductor.custom_graph_pass", "CustomGraphPass", _PARTITION),
    Hook("torch._inductor.config", "joint_custom_pre_pass", _PARTITION),
    Hook("torch._inductor.config", "get_config_copy", "the backend's options are Inductor's"),
    Hook("torch._inductor", "list_mode_options", "the backend's options are Inductor's"),
    Hook("torch._inductor.decomposition", "select_decomp_table", "predict what Inductor saves for the backward"),
    Hook("torch._dynamo.backends.common", "aot_autograd", _PARTITION),
    Hook("torch._dynamo.backends.debugging", "boxed_nop", "run a traced graph as it is"),
    Hook("torch._inductor.custom_graph_pass", "CustomPartitionerFn", _PARTITION),
    Hook("torch._inductor.custom_graph_pass", "get_hash_for_files", _PARTITION),
    Hook("torch._inductor.config", "custom_partitioner_fn", _PARTITION),
    Hook("functorch.compile", "min_cut_rematerialization_partition", _PARTITION),
    Hook("functorch.compile", "default_partition", _PARTITION),
    Hook("functorch.compile", "make_boxed_func", _FLAT),
    Hook("functorch.compile", "make_boxed_func._boxed_call", _FLAT, optional=True),
    Hook("torch._functorch._aot_autograd.schemas", "MutationType", _FLAT),
    Hook("torch._functorch._aot_autograd.schemas", "PlainTensorMeta", _FLAT),
    Hook("torch._functorch.config", "patch", _CONFIG),
    Hook("torch._functorch.config", "force_non_lazy_backward_lowering", _CONFIG),
    Hook("torch._functorch.config", "activation_memory_budget", _CONFIG),
    Hook("torch.fx.traceback", "MEMORY_BUDGET_ANNOTATION_KEY", _PARTITION, optional=True),
    Hook("torch._functorch.config", "donated_buffer", _CONFIG),
    Hook("torch._functorch.config", "enable_autograd_cache", _CONFIG),
    Hook("torch._dynamo.convert_frame", "input_codes", _QUIET),
    Hook("torch._dynamo.convert_frame", "output_codes", _QUIET),
    Hook("torch._dynamo.eval_frame", "reset_code", _QUIET),
    Hook("torch._dynamo.utils", "counters", _QUIET),
    Hook("torch._dynamo.utils", "preserve_rng_state", _QUIET),
    Hook("torch._dynamo.convert_frame", "register_bytecode_hook", "notice an optimizer step compiled for each pattern"),
    Hook("torch._dynamo.guards", "GuardBuilder", _EVAL),
    Hook("torch._dynamo.guards", "install_guard", _EVAL),
    Hook("torch._dynamo.source", "AttrSource", _EVAL),
    Hook("torch._dynamo.symbolic_convert", "InstructionTranslator", _EVAL),
    Hook("torch._dynamo.output_graph", "GraphCompileReason", _BREAKS),
    Hook("torch._dynamo.exc", "Unsupported", "an explanation goes on past a graph break"),
    Hook("torch._dynamo", "OptimizedModule", _LAYERS),
    Hook("torch._dynamo", "OptimizedModule._orig_mod", _LAYERS),
    Hook("torch.nn", "Module._compiled_call_impl", _LAYERS),
    Hook("torch._C", "_current_graph_task_id", _STATE),
    Hook("torch._C._autograd", "_get_current_graph_task_keep_graph", _STATE),
    Hook("torch._C._autograd", "_top_saved_tensors_default_hooks", _STATE),
    Hook("torch.autograd.forward_ad", "_current_level", _STATE),
    Hook("torch", "Tensor._version", "whether a tensor was written to"),
    Hook("torch", "Tensor._is_view", "a view that is saved would keep its base"),
    Hook("torch.autograd.graph", "Node._saved_alpha", "an add hands a gradient on as it is", optional=True),
    Hook("torch._C", "_is_any_autocast_enabled", _AUTOCAST),
    Hook("torch._C", "_DisableAutocast", _AUTOCAST),
    Hook("torch", "_foreach_norm", "the norms of many gradients in one call"),
    Hook("torch._C._autograd", "_push_saved_tensors_default_hooks", _CHECKPOINT),
    Hook("torch._C._autograd", "_pop_saved_tensors_default_hooks", _CHECKPOINT),
    Hook("torch.utils.checkpoint", "_checkpoint_hook", _CHECKPOINT),
    Hook("torch.utils.checkpoint", "_recomputation_hook", _CHECKPOINT),
    Hook("torch._C", "_storage_Use_Count", _SHARDED),
    Hook("torch", "Tensor._use_count", _SHARDED),
    Hook("torch", "UntypedStorage._cdata", "whether two tensors share memory"),
    Hook("torch.distributed.fsdp", "FSDPModule._get_fsdp_state", _SHARDED),
    Hook("torch.distributed.fsdp._fully_shard._fsdp_state", "FSDPState._fsdp_param_group", _SHARDED, optional=True),
    Hook("torch.distributed.fsdp._fully_shard._fsdp_state", "FSDPState._fsdp_param_groups", _SHARDED, optional=True),
    Hook(_GROUP, "FSDPParamGroup._post_forward_indices", _SHARDED),
    Hook(_GROUP, "FSDPParamGroup._training_state", _SHARDED),
    Hook("torch.distributed.fsdp._fully_shard._fsdp_param", "FSDPParam._unsharded_param", _SHARDED),
    Hook("torch.distributed.distributed_c10d", "_get_process_group_store", _RANKS),
    Hook("torch.nn.parallel", "DistributedDataParallel._get_active_ddp_module", "warn where DDP waits for gradients"),
    Hook(
        "torch.nn.parallel",
        "DistributedDataParallel._use_python_reducer",
        "warn where DDP waits for gradients",
        optional=True,
    ),
    Hook("torch._logging._internal", "trace_structured", _LOG),
    Hook("torch._logging._internal", "trace_log", _LOG),
    Hook("torch._C", "_set_grad_enabled", _SWITCH),
    Hook("torch.amp", "_enter_autocast", _SWITCH),
    Hook("torch.amp", "_exit_autocast", _SWITCH),
    Hook("torch.nn", "Module._checkpoint_context_fn", "checkpoints that save different values differ", optional=True),
    Hook("torch.distributed.fsdp", "FullyShardedDataParallel._fsdp_wrapped_module", _NAMES, optional=True),
    Hook(_WRAPPER, "ActivationWrapper._checkpoint_wrapped_module", _NAMES, optional=True),
    Hook("torch._ops", "OpOverload", _WORK),
    Hook("torch._ops", "OpOverload._schema", "what an operator writes into"),
    Hook("torch._ops", "OpOverloadPacket", _WORK),
    Hook("torch._ops", "HigherOrderOperator", _WORK),
    Hook("torch", "_foreach_add", "adds of whole lists are residual adds too"),
    Hook("torch", "_foreach_add_", "adds of whole lists are residual adds too"),
    Hook("torch", "ops.aten._unsafe_view", _FLAT),
    Hook(
        "torch._higher_order_ops.register_hook", "register_hook_op", "hooks on tensors", ("2.13", "2.15"), optional=True
    ),
)


def hooks() -> dict[str, bool]:
    """For each private hook that this package cannot do without whether this PyTorch has it."""
    return {hook.name: hook.is_there() for hook in HOOKS if not hook.optional}


def versions() -> dict[str, str]:
    """Versions of the packages that decide what compiled code looks like."""
    found = {"torch": str(torch.__version__)}
    for name in ("triton", "transformers"):
        with contextlib.suppress(ImportError):
            found[name] = str(importlib.import_module(name).__version__)
    return found
