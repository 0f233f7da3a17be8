"""A callback for Hugging Face's ``Trainer``, and for trainers made from it, such as TRL's ``SFTTrainer``."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import random
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from dropbp_fx import _torch
from dropbp_fx.backend import DropBPBackend
from dropbp_fx.inspect import Explanation, explain
from dropbp_fx.inspect.history import PatternHistory, record_patterns
from dropbp_fx.policy.schedules import RateSchedule, ScheduleName
from dropbp_fx.sensitivity.sensitivity import Metric, check_calibration
from dropbp_fx.values import as_float, shown

try:
    from accelerate.utils import send_to_device
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        f"DropBPCallback needs the package {error.name!r}. Install the extra: pip install 'dropbp-fx[trainer]'",
        name=error.name,
    ) from error

Batch = Mapping[str, Any]
#: Forwards whose patterns the logged saving is averaged over, the latest before each log.
_FORWARDS_COSTED = 32
_KEY = "dropbp_fx"
_STATE_VERSION = 1


@dataclasses.dataclass(frozen=True)
class _Counts:
    """Droppable (branch, forward) pairs so far: how many there were, and how many were dropped."""

    seen: int
    dropped: int

    @classmethod
    def of(cls, backend: DropBPBackend) -> _Counts:
        branches = backend.branches
        return cls(sum(b.times_seen for b in branches), sum(b.times_dropped for b in branches))


class DropBPCallback(TrainerCallback):
    """Steers a backend through a run of the Trainer: progress, calibration, logs and checkpoints.

    Usage::

        policy = DropPolicy(rate=0.5, allocation="sensitivity", schedule="ramp_up")
        backend = dropbp_backend(policy=policy)
        model.compile(backend=backend)
        Trainer(model, arguments, ..., callbacks=[DropBPCallback(backend, calibrate_at=0.1)]).train()

    * Before each optimizer step it sets ``backend.progress``.
    * At ``calibrate_at`` of the run it measures the branches' sensitivities. Neither the order of the training data nor any
      random stream nor the optimizer notices.
    * It adds to each log of training losses ``dropbp_rate``, the share of branches that was dropped since the last one, and
      ``dropbp_saved_memory``, the share of what a full backward would keep of the activations that was not kept (as
      ``explain(backend)`` predicts it, for the patterns of the latest forwards).
    * Checkpoints hold the backend's state, in ``trainer_state.json``, and a resumed run goes on from it.

    Args:
        backend: what the model was compiled with.
        calibrate_at: share of the run's optimizer steps after which sensitivities are measured, in [0, 1); ``None`` for
            never. The backend needs ``allocation="sensitivity"``.
        schedule: how the rate changes over the run, in place of the backend's own schedule
            (:class:`~dropbp_fx.DropPolicy`); ``None`` leaves that.
        calibration_batches: how many random batches of the training data to measure on; or the batches themselves, as the
            model takes them.
        metric: what is measured (:class:`~dropbp_fx.sensitivity.sensitivity.Sensitivity`).
        loss: computes the loss of a batch for calibration: ``loss(model, batch)``. By default the one that the model
            returns for the batch.
        log: what to log: "all", "rate" (tracing the model for the memory takes seconds, once), or "nothing".

    Raises:
        TypeError, ValueError: a bad argument; or, from the Trainer, one that does not go with its arguments or its data.
    """

    def __init__(
        self,
        backend: DropBPBackend,
        *,
        calibrate_at: float | None = None,
        schedule: ScheduleName | RateSchedule | None = None,
        calibration_batches: int | Sequence[Batch] = 1,
        metric: Metric = "gradnorm",
        loss: Callable[[nn.Module, Batch], Tensor] | None = None,
        log: Literal["all", "rate", "nothing"] = "all",
    ) -> None:
        if not isinstance(backend, DropBPBackend):
            raise TypeError(
                f"backend must be what dropbp_backend() returns, not {shown(backend)}: compile the model with it "
                "(model.compile(backend=backend)) and hand it to the callback."
            )
        _check_calibrate_at(calibrate_at, backend)
        if loss is not None and not callable(loss):
            raise TypeError(
                f"loss must be a function of (model, batch) that returns the loss, or None, not {shown(loss)}."
            )
        if not isinstance(log, str) or log not in ("all", "rate", "nothing"):
            raise ValueError(f"log must be 'all', 'rate' or 'nothing', not {shown(log)}.")
        own: tuple[Batch, ...] | None = None
        if not isinstance(calibration_batches, int):
            if isinstance(calibration_batches, (str, Mapping)) or not isinstance(calibration_batches, Sequence):
                raise TypeError(
                    "calibration_batches must be a number of batches, or a list of batches as the model takes them, not "
                    f"{shown(calibration_batches)}."
                )
            own = tuple(calibration_batches)
        count = calibration_batches if own is None else len(own)
        check_calibration(metric, count)
        if schedule is not None:
            backend.schedule = schedule
        self.backend = backend
        self._calibrate_at = calibrate_at
        self._batches = own
        self._count = cast("int", count)
        self._metric: Metric = metric
        self._loss = loss or _loss_of
        self._log = log
        self._calibrated = False
        self._counts = _Counts(0, 0)
        self._history = PatternHistory()
        self._recording = contextlib.ExitStack()
        self._explanation: Explanation | None = None
        self._graphs_explained = 0

    # ---- the Trainer's events --------------------------------------------------------------------------------------

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Refuse a Trainer that compiles the model itself, or has what ``torch.compile(model)`` returned."""
        if _torch.original_module(model) is not model:
            raise ValueError(
                "The Trainer's model is what torch.compile(model) returned. The Trainer would read its arguments off the "
                "wrapper, find none of them in the data, and say that the batch is empty; checkpoints would name parameters "
                "after the wrapper. Compile in place, model.compile(backend=backend), and hand the Trainer the model itself."
            )
        if args.torch_compile:
            raise ValueError(
                f"TrainingArguments(torch_compile=True, torch_compile_backend={args.torch_compile_backend!r}) makes the "
                "Trainer compile the model with a backend of its own, and nothing would be dropped. Leave torch_compile out "
                "and call model.compile(backend=backend) before making the Trainer."
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on where a checkpoint left off; start recording."""
        self._check_data(kwargs.get("train_dataloader"))
        self._calibrated = False
        saved = _states(state).get(_KEY)
        if saved is not None:
            self._restore(saved)
        elif state.global_step:
            warnings.warn(
                f"The checkpoint of step {state.global_step} holds no state of a DropBPCallback, so the resumed run draws "
                "patterns from the start of the sequence and calibrates anew. Use the callback from the first step on.",
                stacklevel=2,
            )
        self._counts = _Counts.of(self.backend)
        self._recording.close()
        if self._log == "all":
            self._history = self._recording.enter_context(record_patterns(self.backend))

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module | None = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Advance the schedule, and calibrate when it is time."""
        progress = state.global_step / max(state.max_steps, 1)
        self.backend.progress = min(progress, 1.0)
        if self._calibrate_at is not None and not self._calibrated and progress >= self._calibrate_at:
            assert model is not None
            self._calibrate(args, state, model, train_dataloader)
            self._calibrated = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the state where the Trainer's next checkpoint finds it."""
        if not self.backend.stats.graphs:
            raise RuntimeError(
                "The model was trained for a step, and the backend of DropBPCallback has not seen it: nothing is dropped. "
                "Call model.compile(backend=backend) with this backend before making the Trainer."
            )
        _states(state)[_KEY] = self.state_dict()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add figures to a log of training losses."""
        if self._log == "nothing" or logs is None or "loss" not in logs:
            return
        figures = self._figures()
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop recording."""
        self._recording.close()

    # ---- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, in types that JSON has."""
        return {"version": _STATE_VERSION, "calibrated": self._calibrated, "backend": self.backend.state_dict()}

    def _restore(self, saved: Mapping[str, Any]) -> None:
        version = saved.get("version") if isinstance(saved, Mapping) else None
        if version != _STATE_VERSION:
            raise ValueError(
                f"The checkpoint's state of a DropBPCallback is of version {shown(version)}, not {_STATE_VERSION}. "
                "Resume with the version of dropbp_fx that saved it."
            )
        if not isinstance(saved.get("calibrated"), bool) or "backend" not in saved:
            raise ValueError(
                "The checkpoint's state of a DropBPCallback lacks 'backend', or its 'calibrated' is neither true nor false. "
                "Resume from a checkpoint that DropBPCallback saved."
            )
        self.backend.load_state_dict(saved["backend"])
        self._calibrated = saved["calibrated"]

    # ---- calibration -----------------------------------------------------------------------------------------------

    def _check_data(self, train_dataloader: Any) -> None:
        dataset = getattr(train_dataloader, "dataset", None)
        if self._calibrate_at is None or self._batches is not None:
            return
        if isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__getitem__"):
            raise ValueError(
                f"A training set of type {type(dataset).__name__} has no examples to pick for a calibration without reading "
                "on in it. Pass DropBPCallback(..., calibration_batches=[...]) with batches as the model takes them."
            )

    def _calibrate(self, args: TrainingArguments, state: TrainerState, model: nn.Module, dataloader: Any) -> None:
        picks = random.Random(f"dropbp_fx:{args.data_seed or args.seed}:{state.global_step}:{args.process_index}")
        own = None if self._batches is None else iter(self._batches)

        def step() -> Tensor:
            batch = next(own) if own is not None else _random_batch(dataloader, args.train_batch_size, picks)
            return self._loss(model, cast("Batch", send_to_device(batch, args.device)))

        model.train()  # as the Trainer does before each of its forwards
        self.backend.calibrate(step, metric=self._metric, batches=self._count, progress_bar=not args.disable_tqdm)

    # ---- logs ------------------------------------------------------------------------------------------------------

    def _figures(self) -> dict[str, float]:
        before, now = self._counts, _Counts.of(self.backend)
        self._counts = now
        if now.seen == before.seen:
            return {}
        figures = {"dropbp_rate": (now.dropped - before.dropped) / (now.seen - before.seen)}
        if self._log == "all":
            figures["dropbp_saved_memory"] = self._saved_memory()
        return figures

    def _saved_memory(self) -> float:
        patterns = self._history.patterns[-_FORWARDS_COSTED:]
        self._history.patterns.clear()
        graphs = self.backend.stats.graphs
        if self._explanation is None or self._graphs_explained != graphs:
            self._explanation, self._graphs_explained = explain(self.backend), graphs
        full = self._explanation.cost_of(()).saved_bytes
        kept = statistics.fmean(self._explanation.cost_of(pattern).saved_bytes for pattern in patterns)
        return 1 - kept / full if full else 0.0


def _states(state: TrainerState) -> dict[str, Any]:
    """What the Trainer saves for callbacks. It is declared as the list of callbacks that the state is made from."""
    return cast("dict[str, Any]", state.stateful_callbacks)


def _check_calibrate_at(share: Any, backend: DropBPBackend) -> None:
    if share is None:
        return
    number = as_float(share)
    if number is None:
        raise TypeError(f"calibrate_at must be a number in [0, 1) or None, not {shown(share)}.")
    if not 0 <= number < 1:
        raise ValueError(
            f"calibrate_at must be in [0, 1), not {shown(share)}: it is the share of the run that is done when "
            "sensitivities are measured, such as 0.1."
        )
    if backend.policy.allocation != "sensitivity":
        raise ValueError(
            f"calibrate_at={share} measures sensitivities, which a backend with allocation={backend.policy.allocation!r} "
            "does not use. Make it with policy=DropPolicy(..., allocation='sensitivity'), or leave calibrate_at out."
        )


def _random_batch(dataloader: Any, size: int, picks: random.Random) -> Any:
    """A batch as the dataloader makes them, past its sampler and its workers, which would not be as they were."""
    dataset = dataloader.dataset
    chosen = picks.sample(range(len(dataset)), min(size, len(dataset)))
    return dataloader.collate_fn([dataset[index] for index in chosen])


def _loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that the model returns, called as the Trainer calls it, so that no graph is compiled for it alone."""
    inputs = dict(batch)
    labels = inputs.get("labels")
    if isinstance(labels, Tensor) and _takes_loss_arguments(model):
        inputs["num_items_in_batch"] = labels[..., 1:].ne(-100).sum().float()  # what the Trainer divides is a float
    outputs = model(**inputs)
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
    if loss is None:
        raise ValueError(
            "The model returned no loss for a calibration batch, which holds "
            f"{', '.join(map(repr, batch))}. Pass DropBPCallback(..., loss=...) with a function of (model, batch) that "
            "computes it, as your Trainer does."
        )
    return cast("Tensor", loss)


def _takes_loss_arguments(model: nn.Module) -> bool:
    base: Any = getattr(model, "get_base_model", lambda: model)()  # peft's
    declared = getattr(base, "accepts_loss_kwargs", None)
    if declared is not None:
        return bool(declared)
    parameters = inspect.signature(base.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
