"""The callback for Hugging Face's Trainer, on the real Trainer and text from disk, a token for each byte."""

from __future__ import annotations

import json
import re
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from dropbp_fx import DropBPBackend, Ramp
from tests.helpers import make_backend

pytest.importorskip("accelerate")

from transformers import Trainer, TrainerCallback, TrainingArguments

from dropbp_fx.integrations.transformers import DropBPCallback

pytestmark = pytest.mark.thorough

TOKENS = 24
STEPS = 8
SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "use_cache": False,
}


def text(module: str, count: int) -> list[dict[str, Tensor]]:
    """``count`` examples from the source of a module of the standard library."""
    data = (Path(sysconfig.get_paths()["stdlib"]) / module).read_bytes()
    rows = [torch.tensor(list(data[at * TOKENS : (at + 1) * TOKENS])) for at in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


TRAIN, HELD_OUT = text("random.py", 64), text("bisect.py", 8)


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 1,
            **changes,
        },
    )


class WatchedTrainer(Trainer):
    """Keeps the batches in the order in which they are trained on."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.__dict__.setdefault("batches", []).append(inputs["input_ids"].clone())
        return super().training_step(model, inputs, *args, **kwargs)


class Tiny(nn.Module):
    """A language model of two residual branches: compiles in no time."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(2))
        self.head = nn.Linear(16, 256)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, target: object = None) -> dict[str, Tensor]:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = x + block(x)
        logits = self.head(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}


def seeded(model: type[nn.Module]) -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SHAPE)) if model is hf.LlamaForCausalLM else model()


def run(
    folder: Path,
    backend: DropBPBackend | None,
    callback: Any = None,
    *,
    model: type[nn.Module] = Tiny,
    resume: str | None = None,
    **changes: Any,
) -> Any:
    """Train a fresh model; its Trainer."""
    built = seeded(model)
    if backend is not None:
        built.compile(backend=backend)
    trainer = WatchedTrainer(
        model=built,
        args=arguments(folder, **changes),
        train_dataset=TRAIN,
        eval_dataset=HELD_OUT,
        callbacks=[] if callback is None else [callback],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def make(**changes: Any) -> DropBPBackend:
    return make_backend(**{"rate": 0.5, "inner": "aot_eager", "seed": 3, "allocation": "sensitivity", **changes})


@pytest.mark.parametrize(
    ("setting", "step"),
    [
        pytest.param({}, 2, id="before-calibration"),
        pytest.param({"bf16": True, "gradient_checkpointing": True}, 6, id="bf16-checkpointing-after-calibration"),
    ],
)
def test_a_run_resumed_from_a_checkpoint_is_the_uninterrupted_run_bit_for_bit(
    tmp_path: Path, setting: dict[str, Any], step: int
) -> None:
    """Sensitivities are measured at step 4: by the resumed run too, or before its checkpoint."""

    def start(folder: Path, **changes: Any) -> Any:
        backend = make()
        callback = DropBPCallback(backend, calibrate_at=0.5, schedule=Ramp(0.2, 0.7), log="rate")
        return run(folder, backend, callback, model=hf.LlamaForCausalLM, **setting, **changes), backend

    whole, backend = start(tmp_path / "whole", save_strategy="steps", save_steps=step)
    resumed, other = start(tmp_path / "resumed", resume=str(tmp_path / "whole" / f"checkpoint-{step}"))
    for key in ("loss", "grad_norm", "dropbp_rate"):
        assert len(logged(whole, key)) == STEPS
        assert logged(resumed, key) == logged(whole, key)
    assert len(resumed.batches) == 2 * (STEPS - step)
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name
    assert other.state_dict() == backend.state_dict()
    assert backend.sensitivity is not None
    assert len({branch.rate for branch in backend.branches}) > 1, "rates go by the sensitivities"
    assert backend.progress == (STEPS - 1) / STEPS
    assert backend.schedule == Ramp(0.2, 0.7)
    assert whole.model.model.layers[0].gradient_checkpointing == bool(setting)


def test_calibration_leaves_data_order_optimizer_and_random_streams_as_they_were(tmp_path: Path) -> None:
    """With every rate 0 an allocation changes nothing, so a run that calibrates is the run that does not."""
    plain = run(tmp_path, make(rate=0.0))
    backend = make(rate=0.0)
    calibrated = run(tmp_path, backend, DropBPCallback(backend, calibrate_at=0.3, calibration_batches=3))
    assert backend.sensitivity is not None
    assert backend.sensitivity.batches == 3
    assert min(backend.sensitivity.values) > 0
    assert all(map(torch.equal, plain.batches, calibrated.batches))
    assert logged(plain, "loss") == logged(calibrated, "loss")
    for name, parameter in plain.model.named_parameters():
        assert torch.equal(parameter, calibrated.model.get_parameter(name)), name


def test_the_callback_measures_what_calibrate_does(tmp_path: Path) -> None:
    batch = {key: torch.stack([row[key] for row in TRAIN[:2]]) for key in ("input_ids", "labels")}
    backend = make()
    callback = DropBPCallback(backend, calibrate_at=0.0, calibration_batches=[batch], metric="gradient")
    run(tmp_path, backend, callback, max_steps=1)
    found = backend.sensitivity
    other, model = make(), seeded(Tiny)
    model.compile(backend=other)
    expected = other.calibrate(lambda: model(**batch)["loss"], metric="gradient")
    assert found is not None
    assert found.names == expected.names
    assert found.values == pytest.approx(expected.values, rel=1e-5)


def test_accumulated_gradients_are_those_of_the_detached_micro_batches(tmp_path: Path) -> None:
    from dropbp_fx.inspect import record_patterns
    from tests.oracle import detached

    found: dict[str, Tensor | None] = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *arguments: Any, **kwargs: Any) -> None:
            found.update((n, None if p.grad is None else p.grad.clone()) for n, p in kwargs["model"].named_parameters())

    backend, model = make(allocation="uniform"), seeded(hf.LlamaForCausalLM)
    model.compile(backend=backend)
    options = arguments(tmp_path, max_steps=1, max_grad_norm=0.0)
    callback = DropBPCallback(backend, log="nothing")
    trainer = WatchedTrainer(model, options, train_dataset=TRAIN, callbacks=[callback, Keep()])
    with record_patterns(backend) as history:
        trainer.train()
    assert len(history.patterns) == 2
    assert not logged(trainer, "dropbp_rate")
    eager = seeded(hf.LlamaForCausalLM)
    for ids, pattern in zip(trainer.batches, history.patterns, strict=True):
        points = [f"model.layers.{index // 2}.{('self_attn', 'mlp')[index % 2]}" for index in sorted(pattern)]
        assert points
        with detached(eager, points):  # type: ignore[arg-type]
            (eager(input_ids=ids, labels=ids).loss / 2).backward()
    for name, parameter in eager.named_parameters():
        actual = found[name]
        assert (actual is None) == (parameter.grad is None), name
        if actual is not None:
            torch.testing.assert_close(actual, parameter.grad, rtol=1e-4, atol=1e-6)


def test_calibration_calls_a_model_as_the_trainer_does_and_compiles_no_graph_of_its_own(tmp_path: Path) -> None:
    backend = make()
    callback = DropBPCallback(backend, calibrate_at=0.5)
    run(tmp_path, backend, callback, model=hf.LlamaForCausalLM, max_steps=2, gradient_accumulation_steps=1)
    assert backend.sensitivity is not None
    assert backend.stats.graphs == 1


def test_logs_show_the_realised_rate_and_the_predicted_saving_and_evaluation_never_drops(tmp_path: Path) -> None:
    from dropbp_fx import explain
    from tests.oracle import eager

    backend = make(rate=0.45, allocation="uniform", pattern="independent", schedule="ramp_up")
    trainer = run(tmp_path, backend, DropBPCallback(backend), logging_steps=4, eval_strategy="steps", eval_steps=4)
    rates, savings = logged(trainer, "dropbp_rate"), logged(trainer, "dropbp_saved_memory")
    assert sum(rates) / 2 == pytest.approx(backend.stats.realised_rate)
    assert rates[0] < rates[1], "the schedule ramps up"
    one = explain(backend).cost_of([0]).saved_bytes / explain(backend).cost_of([]).saved_bytes
    assert savings == pytest.approx([2 * rate * (1 - one) for rate in rates], rel=0.1), "branches of equal size"
    assert all("dropbp_rate" not in entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert backend.stats.forwards == 2 * STEPS, "evaluation is not counted"
    model = seeded(Tiny)
    model.load_state_dict(trainer.model.state_dict())
    batch = {key: torch.stack([row[key] for row in HELD_OUT]) for key in ("input_ids", "labels")}
    assert logged(trainer, "eval_loss")[-1] == pytest.approx(float(model(**batch)["loss"]), rel=1e-4)
    trainer.model.eval()  # dropping is off even where gradients are on
    trainer.model(**batch)["loss"].backward()
    expected = eager(model, lambda m: m(**batch)["loss"], [])
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(trainer.model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6)


def test_only_the_rate_may_be_logged(tmp_path: Path) -> None:
    backend = make(rate=0.5, allocation="uniform", schedule="ramp_up")
    trainer = run(tmp_path, backend, DropBPCallback(backend, log="rate"))
    assert logged(trainer, "dropbp_rate")
    assert not logged(trainer, "dropbp_saved_memory")


def test_bad_arguments_are_refused() -> None:
    backend = make()
    for wrong, kind, text in [
        (lambda: DropBPCallback("dropbp"), TypeError, "backend must be what dropbp_backend() returns, not 'dropbp'"),  # type: ignore[arg-type]
        (
            lambda: DropBPCallback(backend, calibrate_at="early"),  # type: ignore[arg-type]
            TypeError,
            "calibrate_at must be a number in [0, 1) or None, not 'early'.",
        ),
        (lambda: DropBPCallback(backend, calibrate_at=1.0), ValueError, "calibrate_at must be in [0, 1), not 1.0"),
        (
            lambda: DropBPCallback(make(allocation="uniform"), calibrate_at=0.1),
            ValueError,
            "calibrate_at=0.1 measures sensitivities, which a backend with allocation='uniform' does not use.",
        ),
        (
            lambda: DropBPCallback(backend, calibration_batches=0),
            ValueError,
            "batches must be at least 1, not 0",
        ),
        (lambda: DropBPCallback(backend, calibration_batches=[]), ValueError, "batches must be at least 1, not 0"),
        (
            lambda: DropBPCallback(backend, calibration_batches={}),  # type: ignore[arg-type]
            TypeError,
            "calibration_batches must be a number of batches, or a list of batches as the model takes them, not {}.",
        ),
        (lambda: DropBPCallback(backend, metric="loss"), ValueError, "metric must be one of"),  # type: ignore[arg-type]
        (lambda: DropBPCallback(backend, loss=3), TypeError, "loss must be a function of (model, batch)"),  # type: ignore[arg-type]
        (
            lambda: DropBPCallback(backend, log="loud"),
            ValueError,
            "log must be 'all', 'rate' or 'nothing', not 'loud'.",
        ),  # type: ignore[arg-type]
    ]:
        with pytest.raises(kind, match=re.escape(text)):
            wrong()


def test_a_training_set_without_indices_is_refused_before_anything_is_compiled(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(TRAIN)

    backend, model = make(), seeded(Tiny)
    model.compile(backend=backend)
    callback = DropBPCallback(backend, calibrate_at=0.1)
    with pytest.raises(ValueError, match="A training set of type Stream has no examples to pick for a calibration"):
        Trainer(model, arguments(tmp_path), train_dataset=Stream(), callbacks=[callback]).train()
    assert backend.stats.graphs == 0


def test_a_model_that_was_not_compiled_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the backend of DropBPCallback has not seen it: nothing is dropped"):
        run(tmp_path, None, DropBPCallback(make()))


def test_a_model_without_a_loss_needs_a_loss_function(tmp_path: Path) -> None:
    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            return loss(model, inputs)

    def loss(model: Any, inputs: Any) -> Tensor:
        logits = model(input_ids=inputs["input_ids"])["logits"]
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["target"][:, 1:].flatten())

    data = [{"input_ids": row["input_ids"], "target": row["labels"]} for row in TRAIN]

    def train(callback: DropBPCallback) -> None:
        model = seeded(Tiny)
        model.compile(backend=callback.backend)
        options = arguments(tmp_path, max_steps=1, remove_unused_columns=False)
        Own(model, options, train_dataset=data, callbacks=[callback]).train()

    with pytest.raises(
        ValueError, match="The model returned no loss for a calibration batch, which holds 'input_ids', 'target'"
    ):
        train(DropBPCallback(make(), calibrate_at=0.0))
    backend = make()
    train(DropBPCallback(backend, calibrate_at=0.0, loss=loss))
    assert backend.sensitivity is not None


def test_what_torch_compile_returned_is_refused_with_the_remedy(tmp_path: Path) -> None:
    backend = make()
    model = torch.compile(seeded(Tiny), backend=backend)
    with pytest.raises(ValueError, match=r"what torch\.compile\(model\) returned.* model\.compile\(backend=backend\)"):
        Trainer(model, arguments(tmp_path), train_dataset=TRAIN, callbacks=[DropBPCallback(backend)])


def test_the_trainers_own_compilation_is_refused(tmp_path: Path) -> None:
    """By name accelerate does not know the backend; with another one the model would be compiled past it."""
    with pytest.raises(ValueError, match="DROPBP"):
        Trainer(
            seeded(Tiny), arguments(tmp_path, torch_compile=True, torch_compile_backend="dropbp"), train_dataset=TRAIN
        )
    model, backend = seeded(Tiny), make()
    model.compile(backend=backend)
    with pytest.raises(ValueError, match="makes the Trainer compile the model with a backend of its own"):
        Trainer(
            model,
            arguments(tmp_path, torch_compile=True, torch_compile_backend="aot_eager"),
            train_dataset=TRAIN,
            callbacks=[DropBPCallback(backend)],
        )


def test_a_checkpoint_without_the_callback_warns_and_one_of_another_version_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "a", make(), save_strategy="steps", save_steps=1, max_steps=1)
    backend = make()
    with pytest.warns(UserWarning, match="The checkpoint of step 1 holds no state of a DropBPCallback"):
        run(tmp_path / "a", backend, DropBPCallback(backend), resume=str(tmp_path / "a" / "checkpoint-1"), max_steps=2)
    path = tmp_path / "a" / "checkpoint-1" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["stateful_callbacks"]["dropbp_fx"] = {"version": 99}
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="The checkpoint's state of a DropBPCallback is of version 99, not 1"):
        run(tmp_path / "a", backend, DropBPCallback(backend), resume=str(path.parent), max_steps=2)


def test_accelerate_prepares_a_compiled_model_in_a_plain_loop() -> None:
    """``prepare()`` leaves the compiled call in place: patterns, accumulation and the optimizer are as without it."""
    from accelerate import Accelerator

    def train(accelerated: bool) -> tuple[list[Tensor], DropBPBackend]:
        model, backend = seeded(Tiny), make(allocation="uniform")
        model.compile(backend=backend)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        batches = torch.utils.data.DataLoader(torch.stack([row["input_ids"] for row in TRAIN[:8]]), batch_size=2)  # type: ignore[arg-type]
        accelerator = Accelerator(cpu=True)
        if accelerated:
            model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
        for ids in batches:
            loss = model(input_ids=ids, labels=ids)["loss"]
            accelerator.backward(loss) if accelerated else loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in accelerator.unwrap_model(model).parameters()], backend

    (plain, _), (prepared, backend) = train(False), train(True)
    assert backend.stats.forwards == 4
    assert backend.stats.realised_rate == 0.5
    for expected, actual in zip(plain, prepared, strict=True):
        assert torch.equal(actual, expected)


def test_the_core_does_not_import_transformers() -> None:
    import subprocess
    import sys

    code = "import sys, dropbp_fx, dropbp_fx.inspect; assert not {'transformers', 'accelerate'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    blocked = (
        "import sys; sys.modules['transformers'] = None\n"
        "try:\n    import dropbp_fx.integrations.transformers\n"
        "except ImportError as error:\n    print(error)"
    )
    printed = subprocess.run([sys.executable, "-c", blocked], check=True, capture_output=True, text=True).stdout
    assert "pip install 'dropbp-fx[trainer]'" in printed
