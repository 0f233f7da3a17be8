"""The benchmarks' suites of Hugging Face's models, and their methods with CUDA graphs, for correctness: small copies."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import at_peak, distributed, methods
from benchmarks.__main__ import main
from benchmarks.measure import Record, Request, TrainingRun, measure
from benchmarks.methods import DEFAULT, METHODS
from benchmarks.results import load
from benchmarks.suites import SUITES, build, shape_of
from dropbp_fx import DropBPBackend, dropbp_backend
from tests.oracle import assert_exact, compiled, eager, some_patterns

pytestmark = pytest.mark.thorough

TWINS = ["tiny-hf-lora", "tiny-hf-gpt2"]
#: Where an eager model of two layers is detached to drop each branch.
LAYERS = {"tiny-hf-lora": "model.base_model.model.model.layers", "tiny-hf-gpt2": "model.transformer.h"}
PARTS = {"tiny-hf-lora": ("self_attn", "mlp"), "tiny-hf-gpt2": ("attn", "mlp")}
LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
WITH_GRAPHS = ["torch.compile, reduce-overhead", "dropbp_fx, CUDA graphs"]


def points(suite: str) -> list[str]:
    return [f"{LAYERS[suite]}.{layer}.{part}" for layer in range(2) for part in PARTS[suite]]


def request(suite: str, method: str, **more: Any) -> Request:
    values = [0.0, 0.5] if METHODS[method].knob == "rate" else [None]
    small = {"values": values, "steps": 1, "warmup": 0, "inner": "aot_eager", "layers": 2}
    return Request("steps", method, suite, **{**small, **more})


def steps(suite: str, method: str, **more: Any) -> list[Record]:
    return [record for record in measure(request(suite, method, **more)) if record["measurement"] == "steps"]


def twin(suite: str, dtype: torch.dtype) -> nn.Module:
    """A suite's model of two layers. LoRA's updates begin at zero, where they pass no gradient on: here they do not."""
    model = build(shape_of(suite, layers=2), device="cpu", dtype=dtype, fused_loss=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def compiled_twin(suite: str, dtype: torch.dtype) -> tuple[nn.Module, DropBPBackend, Any, Callable[[Any], Tensor]]:
    """A twin, its backend, the compiled twin, and the loss of either."""
    model, backend = twin(suite, dtype), dropbp_backend(inner="aot_eager")
    ids = torch.randint(256, (2, 33))

    def loss_of(run: Any) -> Tensor:
        torch.manual_seed(3)  # dropout's masks: under aot_eager they are eager's
        return run(ids)

    return model, backend, torch.compile(model, backend=backend, dynamic=False), loss_of


# ---- what is trained -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suite", "frozen", "trained"),
    [
        (
            "hf-1b-lora",
            1_235_814_400,
            11_272_192,
        ),  # Llama-3.2-1B's parameters; peft's for rank 16 on every linear layer
        ("hf-smollm2-lora", 134_515_008, 4_884_480),  # SmolLM2-135M's
        ("hf-gpt2", 0, 124_439_808),
    ],
)
def test_a_suite_has_the_parameters_of_the_model_it_is_named_after(suite: str, frozen: int, trained: int) -> None:
    model = build(SUITES[suite], device="meta", dtype=torch.bfloat16, fused_loss=False)
    sizes = {True: 0, False: 0}
    for parameter in model.parameters():
        sizes[parameter.requires_grad] += parameter.numel()
    assert sizes == {True: trained, False: frozen}


def test_lora_is_trained_in_mixed_precision_on_every_linear_layer() -> None:
    model = twin("tiny-hf-lora", torch.bfloat16)
    adapted = {name.rpartition(".lora_A")[0] for name, p in model.named_parameters() if ".lora_A" in name}
    assert adapted == {
        f"{LAYERS['tiny-hf-lora']}.{layer}.{'mlp' if part in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}.{part}"
        for layer in range(2)
        for part in LINEARS
    }
    assert {(p.dtype, p.requires_grad, "lora_" in name) for name, p in model.named_parameters()} == {
        (torch.float32, True, True),
        (torch.bfloat16, False, False),
    }
    llama = model.model.base_model.model
    assert llama.lm_head.weight is llama.model.embed_tokens.weight
    assert llama.config._attn_implementation == "sdpa"


def test_gpt2_is_trained_whole_in_mixed_precision_with_its_dropout() -> None:
    model = twin("tiny-hf-gpt2", torch.bfloat16)
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.float32, True)}
    config = model.model.config
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.1, 0.1, 0.1)
    assert config._attn_implementation == "sdpa"


@pytest.mark.parametrize("suite", TWINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_branches_compute_in_the_precision_asked_for_and_the_loss_in_float32(suite: str, dtype: torch.dtype) -> None:
    model = twin(suite, dtype)
    seen = []
    model.get_submodule(points(suite)[1]).register_forward_hook(lambda _m, _a, output: seen.append(output.dtype))
    assert model(torch.zeros(2, 9, dtype=torch.long)).dtype == torch.float32
    assert seen == [dtype]


@pytest.mark.parametrize("suite", TWINS)
def test_as_many_tokens_go_in_as_the_suite_says(suite: str) -> None:
    model, shape = twin(suite, torch.float32), shape_of(suite)
    seen = []
    model.get_submodule(points(suite)[0]).register_forward_hook(lambda _m, _a, output: seen.append(output[0].shape))
    model(torch.zeros(shape.batch, shape.tokens + 1, dtype=torch.long))
    assert seen == [(shape.batch, shape.tokens, shape.width)]


# ---- methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", TWINS)
def test_dropping_is_exact(suite: str) -> None:
    model, backend, run, loss_of = compiled_twin(suite, torch.float32)
    assert_exact(model, run, backend, loss_of, points(suite), patterns=some_patterns(4, randoms=0))


@pytest.mark.parametrize("suite", TWINS)
def test_dropping_is_exact_but_for_rounding_in_mixed_precision(suite: str) -> None:
    """Eager and compiled code cast at other places: each gradient is held to a share of its own size."""
    model, backend, run, loss_of = compiled_twin(suite, torch.bfloat16)
    for pattern in ([], [1], [0, 2], [1, 2, 3]):
        with backend.pinned(pattern):
            actual = compiled(model, loss_of, run)
        expected = eager(model, loss_of, [points(suite)[index] for index in pattern])
        torch.testing.assert_close(actual.loss, expected.loss)
        for name, gradient in expected.gradients.items():
            found = actual.gradients[name]
            assert (found is None) == (gradient is None), name
            if found is not None and gradient is not None:
                assert (found - gradient).norm() < 0.02 * gradient.norm(), name


@pytest.mark.parametrize("suite", TWINS)
@pytest.mark.parametrize("method", ["torch.compile", "dropbp_fx", *WITH_GRAPHS])
def test_a_method_that_drops_nothing_trains_as_eager_does_and_one_graph_holds_the_step(suite: str, method: str) -> None:
    torch._dynamo.reset()  # graphs of earlier tests would serve
    expected = steps(suite, "eager")[0]["losses"]
    exact, *dropping = steps(suite, method)
    assert exact.get("losses") == pytest.approx(expected, rel=1e-5), exact
    assert (exact["graphs_compiled"], exact["graph_breaks"]) == (1, 0)
    assert exact["first_step_s"] > 0
    assert exact["host_ms"] > 0
    for record in dropping:
        assert record["realised_rate"] == 0.5
        assert record["activation_gib"] < 0.8 * exact["activation_gib"]
        assert (record["graphs_compiled"], record["graph_breaks"]) == (0, 0)


def test_cuda_graphs_are_asked_of_inductor_and_of_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[tuple[Any, Any]] = []
    options: list[Any] = []

    def compiling(model: Any, *, backend: Any, mode: Any = None, **_: Any) -> Any:
        modes.append((backend, mode))
        return model

    def making(*, options: Any = None, asked: list[Any] = options, **more: Any) -> Any:
        asked.append(options)
        return dropbp_backend(options=options, **more)

    monkeypatch.setattr(torch, "compile", compiling)
    monkeypatch.setattr(methods, "dropbp_backend", making)
    for inner in ("inductor", "aot_eager"):
        METHODS["torch.compile, reduce-overhead"].make(nn.Linear(2, 2), inner)
    assert modes == [("inductor", "reduce-overhead"), ("aot_eager", None)]
    for method in ("dropbp_fx, CUDA graphs", "dropbp_fx"):
        for inner in ("inductor", "aot_eager"):
            METHODS[method].make(nn.Linear(2, 2), inner)
    assert options == [{"triton.cudagraphs": True}, None, None, None]
    assert {name for name, method in METHODS.items() if method.cuda_graphs} == set(WITH_GRAPHS)


@pytest.mark.inductor
@pytest.mark.parametrize("method", WITH_GRAPHS)
def test_generated_code_with_cuda_graphs_asked_for_runs_on_a_cpu(method: str) -> None:
    expected = steps("tiny-hf-lora", "eager", layers=1)[0]["losses"]
    records = steps("tiny-hf-lora", method, layers=1, inner="inductor")
    assert records[0].get("losses") == pytest.approx(expected, rel=1e-5), records[0]
    assert not [record["error"] for record in records if "error" in record]


def test_what_weights_and_optimizer_hold_is_counted_once() -> None:
    run = TrainingRun(request("tiny-hf-gpt2", "eager"))
    run.step()
    run.make_optimizer_state()
    parameters = sum(p.numel() for p in run.trainable)
    buffers = sum(t.numel() * t.element_size() for t in run.weights if not isinstance(t, nn.Parameter))
    counts = 4 * len(run.trainable)  # the optimizer's count of steps, for each parameter
    assert run.own_bytes() == 4 * 3 * parameters + buffers + counts


def test_what_a_step_holds_at_its_peak_can_be_listed() -> None:
    assert at_peak.measure("tiny-hf-lora", [0], inner="aot_eager")


# ---- what is refused -------------------------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_by_default_a_suite_is_trained_by_every_method_that_can(tmp_path: Path) -> None:
    def named(suite: str) -> list[str]:
        out = tmp_path / f"{suite}.json"
        main(["run", suite, "--device", "cpu", "--time-limit", "0", "--out", str(out)])
        return [record["method"] for record in load(out)[0].records]

    assert named("tiny") == DEFAULT
    by_hand = ["careful user, no_grad", "careful user, detach", "reference DropBP", "checkpointing"]
    assert named("tiny-hf-lora") == [name for name in DEFAULT if name not in by_hand]
    assert set(WITH_GRAPHS) < set(DEFAULT)


def test_methods_that_take_the_model_apart_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for method in ("careful user, no_grad", "careful user, detach", "checkpointing", "reference DropBP",
                   "reference DropBP, torch.compile"):  # fmt: skip
        for command in ("run", "first-step", "longest"):
            told = refusal(capsys, command, "tiny-hf-gpt2", "--methods", "eager", method)
            assert f"'{method}' cannot train the suite 'tiny-hf-gpt2': such a method takes the benchmarks' own" in told
            assert "'dropbp_fx, CUDA graphs'" in told
        with pytest.raises(ValueError, match="cannot train the suite 'tiny-hf-gpt2'"):
            steps("tiny-hf-gpt2", method)


def test_the_fused_loss_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    told = refusal(capsys, "run", "tiny-hf-lora", "--loss", "fused")
    assert "A model of Hugging Face's computes its loss itself, so the fused loss cannot take its place." in told
    with pytest.raises(ValueError, match="Use the plain loss, or a suite whose name does not begin with hf-"):
        steps("tiny-hf-lora", "eager", loss="fused")


def test_a_package_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    told = refusal(capsys, "run", "tiny-hf-lora")
    assert "needs transformers and peft; not installed here: peft. Install the extra: pip install" in told
    with pytest.raises(ImportError, match="not installed here: peft"):
        steps("tiny-hf-lora", "eager")
    assert steps("tiny-hf-gpt2", "eager")[0]["step_ms"] > 0  # which needs no peft


def test_several_devices_train_the_benchmarks_own_models(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        distributed._parser().parse_args(["tiny-hf-lora"])
    assert "invalid choice: 'tiny-hf-lora'" in capsys.readouterr().err
