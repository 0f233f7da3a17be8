"""What an explanation is of, in words: the model and what it was given. No tensor and no module is kept."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dropbp_fx import _torch
from dropbp_fx.captured import CapturedGraph
from dropbp_fx.policy.drop_policy import DropPolicy
from dropbp_fx.summary import policy_text

_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel")
#: Names that implementations of LoRA give to the matrix whose rows are the rank.
_LORA = ("lora_A", "lora_a", "lora_embedding_A")
#: What Dynamo makes of an argument's name.
_DYNAMO_NAME = re.compile(r"^l_(?:kwargs_|args_)?(.+?)_?$")


@dataclasses.dataclass(frozen=True)
class GivenInput:
    """A tensor that the model was called with.

    Attributes:
        name: of the forward's argument.
        shape: its sizes; ``None`` for one that varies from call to call.
        dtype: of its elements, such as "int64".
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> GivenInput:
        """The words for one tensor; its sizes may be symbols."""
        shape = tuple(size if isinstance(size, int) else None for size in tensor.shape)
        return cls(name, shape, _dtype_name(tensor.dtype))

    @property
    def is_tokens(self) -> bool:
        """Whether these are the numbers of tokens, a row for each example."""
        return len(self.shape) == 2 and self.dtype.startswith("int")

    def __str__(self) -> str:
        shape = " x ".join(map(_size, self.shape)) or "scalar"
        return f"{self.name} ({shape} {self.dtype})"


@dataclasses.dataclass(frozen=True)
class Given:
    """The model of an explanation and what it was given.

    Attributes:
        model: class name of the model inside of adapters and wrappers.
        inputs: the tensors it was called with.
        dtype: of the parameters; of the trained and the frozen ones where these differ.
        training: what is trained: an adapter and its rank, or which share of the parameters.
        rate: the drop rate.
        policy: its name, or its fields if it has none.
        device: of the parameters.
        forwards: how many training forwards a live backend had run; ``None`` where nothing was run.
    """

    model: str
    inputs: tuple[GivenInput, ...]
    dtype: str
    training: str
    rate: float
    policy: str
    device: str
    forwards: int | None = None

    @property
    def facts(self) -> tuple[str, ...]:
        """All but the model, in a few words each; what is not known is left out."""
        return (
            *_sizes(self.inputs),
            *(fact for fact in (self.dtype, self.training) if fact),
            f"rate {self.rate:g}",
            f"policy {self.policy}",
            *((f"device {self.device}",) if self.device else ()),
        )

    @property
    def title(self) -> str:
        """The model and what it was given, in one line."""
        return f"{self.model}: {', '.join(self.facts)}"


def given_arguments(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[GivenInput, ...]:
    """The tensors among the arguments of a model's forward, under the forward's names for them."""
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
        named = dict(bound.arguments)
    except (TypeError, ValueError):  # the forward itself says better what it does not take
        named = {**{f"argument {position}": value for position, value in enumerate(args)}, **kwargs}
    found: list[GivenInput] = []
    for name, value in named.items():
        parts = value.items() if isinstance(value, Mapping) else [(name, value)]
        found += [GivenInput.of(str(part), tensor) for part, item in parts for tensor in _tensors(item)]
    return tuple(found)


def captured_inputs(graphs: Sequence[CapturedGraph]) -> tuple[GivenInput, ...]:
    """The tensors that the first of these graphs was called with, besides what belongs to modules."""
    given = next((graph.entered.given for graph in graphs if graph.entered.given), ())
    return tuple(GivenInput.of(_argument_name(name), tensor) for name, tensor in given)


def describe_given(
    models: Sequence[nn.Module],
    inputs: Iterable[GivenInput],
    policy: DropPolicy,
    rate: float,
    *,
    forwards: int | None = None,
) -> Given:
    """Say what was explained.

    Args:
        models: usually one; none where it is not known, or was let go of.
        inputs: what it was called with.
        policy: what drops.
        rate: the rate asked for.
        forwards: how many training forwards were run, ``None`` for an explanation of what was not run.
    """
    parameters = {id(p): p for model in models for p in model.parameters()}.values()
    whole = [(name, p) for model in models for name, p in model.named_parameters()]
    classes = Counter(type(_inner(model)).__name__ for model in models)
    return Given(
        model=", ".join(f"{count} x {name}" if count > 1 else name for name, count in classes.items()) or "a model",
        inputs=tuple(inputs),
        dtype=_dtypes(parameters),
        training=_training(models, whole),
        rate=rate,
        policy=policy.name or f"of its own ({policy_text(policy).partition(': ')[2]})",
        device=", ".join(dict.fromkeys(_device(p.device) for p in parameters)),
        forwards=forwards,
    )


def _argument_name(name: str) -> str:
    name = _DYNAMO_NAME.sub(r"\1", name)
    return f"argument {name}" if name.isdigit() else name


def _tensors(value: object) -> list[Tensor]:
    found: list[Tensor] = []
    _torch.tree_map_only(Tensor, found.append, value)
    return found


def _sizes(inputs: Sequence[GivenInput]) -> list[str]:
    """Batch and sequence, or the whole shape of an input that is no tokens."""
    tokens = next((given for given in inputs if given.is_tokens), None)
    main = next((given for given in inputs if given.shape), None)
    if tokens is not None and (main is None or main is tokens or len(main.shape) < 3):
        return [f"batch {_size(tokens.shape[0])}", f"sequence {_size(tokens.shape[1])}"]
    return [] if main is None else [f"batch {_size(main.shape[0])}", str(main)]


def _size(size: int | None) -> str:
    return "any" if size is None else str(size)


def _inner(model: Any) -> Any:
    """The model that wrappers of PyTorch's and an adapter of PEFT's are around."""
    model = _torch.original_module(model)
    while type(model).__name__ in _WRAPPERS and isinstance(getattr(model, "module", None), nn.Module):
        model = _torch.original_module(model.module)
    if hasattr(model, "peft_config") and callable(getattr(model, "get_base_model", None)):
        return model.get_base_model()
    return model


def _dtypes(parameters: Iterable[nn.Parameter]) -> str:
    elements: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for p in parameters:
        elements[p.requires_grad][_dtype_name(p.dtype)] += p.numel()
    trained, frozen = (" and ".join(name for name, _ in elements[trains].most_common()) for trains in (True, False))
    if trained == frozen or not (trained and frozen):
        return trained or frozen
    return f"{frozen} frozen, {trained} trained"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _training(models: Sequence[Any], named: Sequence[tuple[str, nn.Parameter]]) -> str:
    trained = [(name, p) for name, p in named if p.requires_grad]
    factors = [(name, p) for name, p in trained if any(part in _LORA for part in name.split("."))]
    ranks = sorted({p.shape[0] for _, p in factors})
    if ranks:
        dora = any("lora_magnitude_vector" in name for name, _ in trained)
        several = len(ranks) > 1
        return f"{'DoRA' if dora else 'LoRA'} {'ranks' if several else 'rank'} {' and '.join(map(str, ranks))}"
    adapters = [adapter for model in models for adapter in _adapters(model)]
    if adapters:
        return " and ".join(dict.fromkeys(adapters))
    if not named or not trained:
        return "nothing trained" if named else ""
    if len(trained) == len(named):
        return "all parameters trained"
    share = sum(p.numel() for _, p in trained) / max(sum(p.numel() for _, p in named), 1)
    return f"{100 * share:.3g} % of the parameters trained"


def _adapters(model: Any) -> list[str]:
    """The kinds of PEFT's adapters in a model."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping):
        return []
    return [str(getattr(config.peft_type, "value", config.peft_type)) for config in configs.values()]


def _device(device: torch.device) -> str:
    if device.type == "cuda" and torch.cuda.is_available():
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)
