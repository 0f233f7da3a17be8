"""Adapters of the peft library: the branches are the decoder's, never an adapter's own adds, and gradients are exact."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from dropbp_fx import dropbp_backend
from tests.matrix import family, language_loss
from tests.oracle import assert_exact, detached, some_patterns

pytestmark = pytest.mark.thorough

#: peft puts a wrapper around the model and one around that; a branch is named by where it is, which get_submodule() takes.
BRANCHES = [f"base_model.model.model.layers.{i}.{part}" for i in range(2) for part in ("self_attn", "mlp")]
ATTENTION = [0, 2]
EVERYWHERE = [0, 1, 2, 3]


def llama() -> Any:
    torch.manual_seed(1)
    return family("Llama").build().train()


def seeded_loss(model: Any) -> Tensor:
    torch.manual_seed(3)
    return language_loss(model)


def lora(**options: Any) -> peft.LoraConfig:
    # Of lora_B's usual zeros, every gradient of lora_A would be zero, whatever is dropped.
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM", **options})


#: For each adapter: its configuration, a part of the names of all that it trains, and the branches that hold some of that.
ADAPTERS: dict[str, tuple[Callable[[], peft.PeftConfig], str, Sequence[int]]] = {
    "LoRA on queries and values": (lambda: lora(target_modules=["q_proj", "v_proj"]), "lora_", ATTENTION),
    "LoRA on every linear layer": (lambda: lora(target_modules="all-linear"), "lora_", EVERYWHERE),
    "LoRA with dropout": (lambda: lora(target_modules="all-linear", lora_dropout=0.2), "lora_", EVERYWHERE),
    "LoRA with biases": (lambda: lora(target_modules="all-linear", lora_bias=True), "lora_", EVERYWHERE),
    "rsLoRA": (lambda: lora(target_modules="all-linear", use_rslora=True), "lora_", EVERYWHERE),
    "(IA)3": (
        lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        ),
        "ia3_l",
        EVERYWHERE,
    ),
    "VeRA": (lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"]), "vera_lambda", ATTENTION),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_exact_and_only_the_decoder_has_branches(name: str) -> None:
    config, trained, holders = ADAPTERS[name]
    model = peft.get_peft_model(llama(), config())
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    patterns = some_patterns(4, randoms=1, trainable=holders)
    # Under aot_eager the forward is eager's, operation for operation: with one seed both draw the same dropout masks.
    assert_exact(model, run, backend, seeded_loss, BRANCHES, patterns=patterns)
    assert [branch.name for branch in backend.branches] == BRANCHES
    assert [branch.index for branch in backend.branches if branch.trainable] == list(holders)
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient
    assert all(trained in name for name in with_gradient)


def test_modules_to_save_are_trained_along_and_dropping_leaves_them_alone() -> None:
    model = peft.get_peft_model(llama(), lora(target_modules=["q_proj"], modules_to_save=["lm_head", "up_proj"]))
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    assert_exact(model, run, backend, language_loss, BRANCHES, patterns=some_patterns(4, randoms=1))
    assert model.base_model.model.lm_head.modules_to_save["default"].weight.grad is not None
    assert model.base_model.model.lm_head.original_module.weight.grad is None


def test_switching_between_adapters_stays_exact_and_keeps_the_branches() -> None:
    model = peft.get_peft_model(llama(), lora(target_modules=["q_proj", "v_proj"]))
    model.add_adapter("second", lora(r=3, target_modules="all-linear"))
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    for adapter, holders in (("default", ATTENTION), ("second", EVERYWHERE), ("default", ATTENTION)):
        model.set_adapter(adapter)
        patterns = some_patterns(4, randoms=1, trainable=holders)
        assert_exact(model, run, backend, language_loss, BRANCHES, patterns=patterns)
        assert [branch.name for branch in backend.branches] == BRANCHES


def test_an_adapter_merged_and_unmerged_again_is_exact() -> None:
    model = peft.get_peft_model(llama(), lora(target_modules="all-linear"))
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    apart = language_loss(run)
    model.merge_adapter()
    merged = language_loss(run)
    assert not merged.requires_grad, "a merged adapter takes no part in the forward"
    torch.testing.assert_close(merged, apart.detach(), rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert_exact(model, run, backend, language_loss, BRANCHES)
    assert [branch.name for branch in backend.branches] == BRANCHES


def test_a_merged_and_unloaded_adapter_leaves_the_plain_model() -> None:
    model = peft.get_peft_model(llama(), lora(target_modules="all-linear")).merge_and_unload()
    model.requires_grad_(True)
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    names = [name.removeprefix("base_model.model.") for name in BRANCHES]
    assert_exact(model, run, backend, language_loss, names, patterns=[[], [0, 3]])
    assert [branch.name for branch in backend.branches] == names


def test_disabled_adapters_train_nothing() -> None:
    model = peft.get_peft_model(llama(), lora(target_modules="all-linear"))
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    with model.disable_adapter():
        assert not language_loss(run).requires_grad
    assert_exact(model, run, backend, language_loss, BRANCHES, patterns=[[], [1, 2]])


@pytest.mark.filterwarnings("ignore:The rate asked for is 0.9")  # more than a prefix that one branch must reach allows
def test_a_prefix_is_trained_through_kept_branches_only() -> None:
    # The prefix is no branch's own: it is computed before the first layer and read by each layer's attention.
    model = peft.get_peft_model(llama(), peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    points = [name.replace("base_model.model.", "base_model.", 1) for name in BRANCHES]
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    patterns = some_patterns(4, trainable=ATTENTION)  # some attention is kept, or nothing would be trained
    assert_exact(model, run, backend, language_loss, points, patterns=patterns)
    assert [branch.name for branch in backend.branches] == points
    assert [branch.index for branch in backend.branches if branch.trainable] == ATTENTION
    with (
        pytest.raises(ValueError, match="drops all 2 branches that have trainable parameters"),
        backend.pinned(ATTENTION),
    ):
        pass
    backend.rate = 0.9
    for _ in range(12):  # a draw that dropped all attention would leave the loss without a gradient
        language_loss(run).backward()


def test_dora_is_exact_once_dynamo_can_trace_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # peft asks for the module of the weight's class, which Dynamo does not trace; the weight is a plain one here.
    monkeypatch.setattr("peft.tuners.lora.dora.dequantize_module_weight", lambda module: module.weight)
    model = peft.get_peft_model(llama(), lora(target_modules="all-linear", use_dora=True, lora_dropout=0.2))
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    assert_exact(model, run, backend, seeded_loss, BRANCHES, patterns=some_patterns(4, randoms=1))
    assert [branch.name for branch in backend.branches] == BRANCHES


@pytest.mark.xfail(strict=True, raises=torch._dynamo.exc.Unsupported)
def test_dora_as_it_is_can_be_traced_by_any_backend() -> None:
    model = peft.get_peft_model(llama(), lora(target_modules=["q_proj"], use_dora=True))
    language_loss(torch.compile(model, backend="aot_eager", fullgraph=True))


def trained_steps(model: nn.Module, run: Any, drop: Callable[[int], Any], steps: int = 3) -> list[Tensor]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        with drop(step):
            loss = seeded_loss(run)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def test_lora_with_dropout_learns_what_the_detached_eager_model_learns() -> None:
    config = lora(target_modules="all-linear", lora_dropout=0.1)
    model = peft.get_peft_model(llama(), config)
    copied = copy.deepcopy(model)
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    with backend.disabled():
        seeded_loss(run)
    patterns = [[0, 3], [1], [2, 3]]
    losses = trained_steps(model, run, lambda step: backend.pinned(patterns[step]))
    expected = trained_steps(copied, copied, lambda step: detached(copied, [BRANCHES[i] for i in patterns[step]]))
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(list(model.parameters()), list(copied.parameters()), rtol=1e-4, atol=1e-5)


def is_a_linear_layer_of_the_decoder(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "layers" in name


@pytest.mark.parametrize("double", [False, True], ids=["", "double quantisation"])
def test_qlora_over_four_bit_weights_is_exact(double: bool) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="four-bit weights need bitsandbytes")
    model = llama()
    for name, linear in list(model.named_modules()):
        if is_a_linear_layer_of_the_decoder(linear, name):
            layer = bitsandbytes.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=False,
                compute_dtype=torch.float32,
                compress_statistics=double,
                quant_type="nf4",
            )
            layer.load_state_dict(linear.state_dict())
            model.set_submodule(name, layer.to(linear.weight.device))  # moving is what quantises
    model.requires_grad_(False)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    model = peft.get_peft_model(model, lora(target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.1))
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    assert_exact(model, run, backend, seeded_loss, BRANCHES, patterns=some_patterns(4, randoms=1))
    assert [branch.name for branch in backend.branches] == BRANCHES


def test_lora_over_eight_bit_weights_of_torchao_is_exact() -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="eight-bit weights need torchao")
    model = llama().requires_grad_(False)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=is_a_linear_layer_of_the_decoder)
    model = peft.get_peft_model(model, lora(target_modules=["q_proj", "v_proj", "down_proj"]))
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    assert_exact(model, run, backend, language_loss, BRANCHES, patterns=some_patterns(4, randoms=1))
    assert [branch.name for branch in backend.branches] == BRANCHES
