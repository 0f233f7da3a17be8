"""Calibration: equal to brute force for every branch, cheap, and without a trace."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dropbp_fx import DropBPBackend, Sensitivity, dropbp_backend
from dropbp_fx.sensitivity.calibration import Calibration
from tests.flops import FlopCounter
from tests.helpers import compile_model
from tests.oracle import DetachPoint, eager
from tests.test_models import IDS, SMALL, ResidualMLP, language_loss, square_loss

pytestmark = pytest.mark.thorough

METRICS = ("gradnorm", "gradient")
Loss = Callable[[Any], Tensor]


def measure(gradients: dict[str, Tensor | None], without: dict[str, Tensor | None], metric: str) -> float:
    """The metric by its definition."""
    total = 0.0
    for name, gradient in gradients.items():
        whole = torch.zeros(()) if gradient is None else gradient
        left = torch.zeros_like(whole) if without[name] is None else without[name]
        assert left is not None
        if metric == "gradnorm":
            total += float(whole.norm() - left.norm()) ** 2
        else:
            total += float((whole - left).norm()) ** 2
    return total


def brute_force(model: nn.Module, loss_of: Loss, points: Sequence[DetachPoint], metric: str) -> list[float]:
    """One whole eager step for each branch."""
    exact = eager(model, loss_of, []).gradients
    return [measure(exact, eager(model, loss_of, [point]).gradients, metric) for point in points]


@dataclasses.dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    loss: Loss
    points: Sequence[DetachPoint]


def llama(**options: Any) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, **options)).double()


def neox() -> nn.Module:
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL, use_parallel_residual=True)).double()


def t5() -> nn.Module:
    config = hf.T5Config(
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=1,
        num_decoder_layers=2,
        num_heads=4,
        vocab_size=61,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return hf.T5ForConditionalGeneration(config).double()


def albert() -> nn.Module:
    config = hf.AlbertConfig(**SMALL, embedding_size=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return hf.AlbertForMaskedLM(config).double()


def frozen_below() -> nn.Module:
    model: Any = llama()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    return model


class TwoTowers(nn.Module):
    """One encoder for two inputs, and a loss that joins them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ResidualMLP()

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x) * self.encoder(x.flip(0).sin())


class BatchNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(3)
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


LLAMA = [f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn", "mlp")]
IMAGES = torch.linspace(-1, 1, 3 * 4 * 6 * 6).reshape(3, 4, 6, 6).sin().double()
X = torch.linspace(-1, 1, 40).reshape(5, 8).cos().double()


def mlp_loss(model: Any) -> Tensor:
    return model(X).square().mean()


def twice(model: Any) -> Tensor:
    return language_loss(model) + 2 * model(input_ids=IDS.flip(0, 1), labels=IDS).loss


CASES = {
    "llama": Case(llama, language_loss, LLAMA),
    "tied embeddings": Case(lambda: llama(tie_word_embeddings=True), language_loss, LLAMA),
    "parallel branches": Case(
        neox, language_loss, [f"gpt_neox.layers.{i}.{name}" for i in range(2) for name in ("attention", "mlp")]
    ),
    "encoder and decoder": Case(
        t5,
        language_loss,
        [
            *(f"encoder.block.0.layer.{j}.{name}" for j, name in enumerate(("SelfAttention", "DenseReluDense"))),
            *(
                f"decoder.block.{i}.layer.{j}.{name}"
                for i in range(2)
                for j, name in enumerate(("SelfAttention", "EncDecAttention", "DenseReluDense"))
            ),
        ],
    ),
    "one layer used again and again": Case(
        albert,
        language_loss,
        [
            (f"albert.encoder.albert_layer_groups.0.albert_layers.0.{name}", call)
            for call in range(2)
            for name in ("attention.dense", "ffn_output")
        ],
    ),
    "a model that runs twice in a step": Case(llama, twice, LLAMA),
    "frozen below": Case(frozen_below, language_loss, LLAMA[2:]),
    "batch norm": Case(
        lambda: BatchNorms().double(), lambda run: run(IMAGES).square().sum(), [f"blocks.{i}" for i in range(3)]
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_branch_equals_brute_force(case: Case) -> None:
    model = case.build()
    backend, run = compile_model(model)
    for metric in METRICS:
        expected = brute_force(model, case.loss, case.points, metric)
        found = backend.calibrate(lambda: case.loss(run), metric=metric)
        droppable = [value for branch, value in zip(backend.branches, found.values, strict=True) if branch.droppable]
        assert len(droppable) == len(expected), [branch.name for branch in backend.branches]
        assert min(expected) > 0, "nothing to tell apart"
        for branch, (value, wanted) in enumerate(zip(droppable, expected, strict=True)):
            assert value == pytest.approx(wanted, rel=1e-3), f"branch {branch}"


def test_two_towers_of_one_encoder_count_as_one_pattern() -> None:
    """Each block runs twice in one graph: four branches by position, with parameters in common."""
    model = TwoTowers().double()
    points = [(f"encoder.blocks.{i}", call) for call in range(2) for i in range(3)]
    backend, run = compile_model(model)
    for metric in METRICS:
        found = backend.calibrate(lambda: mlp_loss(run), metric=metric)
        assert list(found.values) == pytest.approx(brute_force(model, mlp_loss, points, metric), rel=1e-3)


def test_one_graph_for_several_blocks_between_eager_layers_is_measured_for_each_of_them() -> None:
    """Embedding and head stay eager and are tied: their gradients are seen between the borders."""
    model: Any = llama(tie_word_embeddings=True)
    exact = eager(model, language_loss, []).gradients
    points = [f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn", "mlp")]
    without = [eager(model, language_loss, [point]).gradients for point in points]
    backend = dropbp_backend(inner="aot_eager", seed=0)
    for layer in model.model.layers:
        layer.compile(backend=backend)
    for metric in METRICS:
        found = backend.calibrate(lambda: language_loss(model), metric=metric)
        assert list(found.values) == pytest.approx([measure(exact, left, metric) for left in without], rel=1e-3)


@torch._dynamo.disable
def in_eager(x: Tensor) -> Tensor:
    return x.sin() + x


class Broken(ResidualMLP):
    """A graph break between blocks, with something eager in it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.blocks[0](x)
        x = in_eager(x)
        x = x + self.blocks[1](x)
        x = x + self.blocks[2](x)
        return self.head(x)


@pytest.mark.parametrize("metric", METRICS)
def test_graph_breaks(metric: Any) -> None:
    model = Broken().double()
    expected = brute_force(model, mlp_loss, [f"blocks.{i}" for i in range(3)], metric)
    backend, run = compile_model(model)
    found = backend.calibrate(lambda: mlp_loss(run), metric=metric)
    assert list(found.values) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("metric", METRICS)
def test_a_checkpoint_around_the_compiled_model_is_recomputed_alike(metric: Any) -> None:
    inner = ResidualMLP().double()
    expected = brute_force(inner, mlp_loss, [f"blocks.{i}" for i in range(3)], metric)
    backend, run = compile_model(inner)

    def step() -> Tensor:
        return checkpoint(run, X, use_reentrant=False).square().mean()  # type: ignore[union-attr]

    assert list(backend.calibrate(step, metric=metric).values) == pytest.approx(expected, rel=1e-3)


def test_a_reentrant_checkpoint_is_refused() -> None:
    backend, run = compile_model(ResidualMLP().double())
    x = X.clone().requires_grad_()
    with backend.disabled():
        mlp_loss(run).backward()

    def step() -> Tensor:
        return checkpoint(run, x, use_reentrant=True).square().mean()  # type: ignore[union-attr]

    with pytest.raises((RuntimeError, ValueError), match=r"use_reentrant=False|No residual branch ran with gradients"):
        backend.calibrate(step)


def test_dropout_masks_are_those_of_the_step_where_a_region_is_run_again() -> None:
    """Parallel branches: the region runs again with one of them pruned, and must draw the same masks."""
    model = hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(**{**SMALL, "num_hidden_layers": 1}, hidden_dropout=0.3, attention_dropout=0.2)
    ).double()
    backend, run = compile_model(model)

    def seeded_loss(_: Any) -> Tensor:
        torch.manual_seed(5)
        return language_loss(run)

    seeded_loss(run)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def gradients(pattern: list[int]) -> dict[str, Tensor | None]:
        with backend.pinned(pattern):
            loss = seeded_loss(run)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))

    exact = gradients([])
    expected = [measure(exact, gradients([branch]), "gradient") for branch in range(2)]
    found = backend.calibrate(lambda: seeded_loss(run), metric="gradient")
    assert list(found.values) == pytest.approx(expected, rel=1e-3)


def test_several_batches_are_averaged() -> None:
    model = ResidualMLP().double()
    backend, run = compile_model(model)
    inputs = [X, X.sin(), X * 3]

    def sensitivities(batches: list[Tensor]) -> Sensitivity:
        feed = iter(batches)
        return backend.calibrate(lambda: run(next(feed)).square().mean(), batches=len(batches))

    single = [sensitivities([x]).values for x in inputs]
    together = sensitivities(inputs)
    assert together.batches == 3
    assert list(together.values) == pytest.approx([math.fsum(column) / 3 for column in zip(*single, strict=True)])


def everything_about(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return copy.deepcopy(
        {
            "model": model.state_dict(),
            "gradients": {name: p.grad for name, p in model.named_parameters()},
            "optimizer": optimizer.state_dict(),
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": np.random.get_state(),
        }
    )


def assert_same(left: Any, right: Any) -> None:
    if isinstance(left, Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, np.ndarray):
        assert np.array_equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for pair in zip(left, right, strict=True):
            assert_same(*pair)
    else:
        assert left == right


def trained_batch_norms() -> tuple[nn.Module, torch.optim.Optimizer, DropBPBackend, Any]:
    model = BatchNorms().double()
    optimizer = torch.optim.AdamW(model.parameters())
    backend, run = compile_model(model)
    for _ in range(2):
        run(IMAGES).square().sum().backward()
        optimizer.step()
    return model, optimizer, backend, run


def test_nothing_is_changed_neither_gradients_nor_buffers_nor_random_streams_nor_the_next_pattern() -> None:
    model, optimizer, backend, run = trained_batch_norms()
    before, policy = everything_about(model, optimizer), backend.state_dict()

    def step() -> Tensor:
        torch.randn(3), random.random(), np.random.rand()
        return run(IMAGES).square().sum()

    backend.calibrate(step, batches=2)
    assert_same(everything_about(model, optimizer), before)
    after = backend.state_dict()
    assert {**after, "sensitivity": None} == {**policy, "sensitivity": None}
    assert before["model"]["blocks.0.1.num_batches_tracked"] == 2, "the buffers would have shown a third step"


def test_an_interrupt_leaves_everything_as_it_was_and_keeps_the_batches_that_were_finished() -> None:
    model, optimizer, backend, run = trained_batch_norms()
    before = everything_about(model, optimizer)
    calls = iter(range(10))

    def step() -> Tensor:
        if next(calls) == 2:
            loss = run(IMAGES * 2).square().sum()
            loss.register_hook(lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
            return loss
        return run(IMAGES).square().sum()

    with pytest.raises(KeyboardInterrupt):
        backend.calibrate(step, batches=5)
    assert_same(everything_about(model, optimizer), before)
    assert backend.sensitivity is not None
    assert backend.sensitivity.batches == 2
    with backend.disabled():
        run(IMAGES).square().sum().backward()  # and the model trains on


def test_the_work_is_less_than_four_tenths_of_the_reference_procedure_on_24_layers() -> None:
    """Two branches a layer, which is all that the count depends on."""
    counter = FlopCounter()
    backend, run = compile_model(ResidualMLP(depth=48), inner=counter.inner)
    with backend.disabled():
        square_loss(run).backward()
    counter.reset()
    with backend.disabled():
        square_loss(run).backward()
    step = counter.forward + counter.backward
    counter.reset()
    backend.calibrate(lambda: square_loss(run))
    reference = (len(backend.branches) + 1) * step
    assert len(backend.branches) == 48
    assert counter.forward + counter.backward < 0.4 * reference
    assert counter.forward == pytest.approx(step / 3, rel=0.05), "one forward for all branches"


def test_no_more_than_one_regions_gradients_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = llama()
    backend, run = compile_model(model)
    alive: list[tuple[weakref.ref[Tensor], int]] = []
    most = 0
    contribute = Calibration._contribute

    def watched(self: Calibration, leaf: Tensor, gradient: Tensor) -> None:
        nonlocal most
        contribute(self, leaf, gradient)
        alive.append((weakref.ref(gradient), gradient.numel()))
        most = max(most, sum(size for reference, size in alive if reference() is not None))

    monkeypatch.setattr(Calibration, "_contribute", watched)
    backend.calibrate(lambda: language_loss(run))
    largest = max(
        *(sum(p.numel() for p in layer.mlp.parameters()) + 32 for layer in model.model.layers),
        model.lm_head.weight.numel() + 32,
    )
    assert 0 < most <= largest


def test_values_are_in_the_order_of_the_branches_and_zero_where_no_gradient_comes() -> None:
    backend, run = compile_model(frozen_below())
    found = backend.calibrate(lambda: language_loss(run))
    assert found.names == tuple(branch.name for branch in backend.branches)
    assert [value > 0 for value in found.values] == [branch.droppable for branch in backend.branches]
    assert str(found).splitlines()[0].split()[:2] == ["branch", "sensitivity"]
    assert backend.sensitivity == found


def test_gradients_of_inputs_do_not_count_beside_parameters() -> None:
    model = ResidualMLP().double()
    backend, run = compile_model(model)
    plain = backend.calibrate(lambda: run(X).square().mean()).values
    asked = backend.calibrate(lambda: run(X.clone().requires_grad_()).square().mean()).values
    assert list(asked) == pytest.approx(list(plain))


@pytest.mark.parametrize(
    ("step", "arguments", "error", "text"),
    [
        (3, {}, TypeError, r"step must be a function that runs a forward and returns its loss, not 3\."),
        (lambda: None, {}, TypeError, r"step\(\) must return the loss, a tensor of one element, not None\."),
        (lambda: torch.ones(2), {}, TypeError, r"not a tensor of shape \(2,\)"),
        (lambda: torch.ones(()), {}, ValueError, r"requires no gradient\. Return it as the model computed it"),
        (lambda: None, {"metric": "norm"}, ValueError, r"metric must be one of 'gradnorm', 'gradient', not 'norm'\."),
        (lambda: None, {"batches": 0}, ValueError, r"batches must be at least 1, not 0"),
        (lambda: None, {"batches": 1.5}, TypeError, r"batches must be a whole number, not 1\.5"),
    ],
)
def test_bad_arguments_are_refused(step: Any, arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    backend, _ = compile_model(ResidualMLP())
    with pytest.raises(error, match=text):
        backend.calibrate(step, **arguments)


def test_a_step_that_runs_no_branch_is_refused() -> None:
    model = ResidualMLP()
    backend, run = compile_model(model)
    model.eval()
    with pytest.raises(ValueError, match=r"No residual branch ran with gradients in step\(\).*model\.train\(\)"):
        backend.calibrate(lambda: square_loss(run))
    assert backend.sensitivity is None


def test_gradients_that_are_not_finite_are_refused_with_the_branch() -> None:
    model = ResidualMLP()
    with torch.no_grad():
        model.blocks[1][0].weight.fill_(float("inf"))
    backend, run = compile_model(model)
    with pytest.raises(ValueError, match=r"The sensitivity of 'blocks\.\d' is (nan|inf): .* not finite"):
        backend.calibrate(lambda: square_loss(run))


def test_mixed_precision_runs() -> None:
    model = ResidualMLP()
    backend, run = compile_model(model)

    def step() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.mse_loss(run(X.float()), torch.zeros(5, 4))

    assert min(backend.calibrate(step).values) > 0


@pytest.mark.inductor
def test_inductor_whose_cache_knows_the_training_variants_already() -> None:
    """Their backwards may overwrite what they read; those of calibration must not, though nothing else tells them apart."""
    model = llama().float()
    expected = brute_force(model, language_loss, LLAMA, "gradnorm")
    backend, run = compile_model(model, inner="inductor")
    with backend.disabled():
        language_loss(run).backward()
    backend.warmup()
    found = backend.calibrate(lambda: language_loss(run))
    assert list(found.values) == pytest.approx(expected, rel=1e-3)
    with backend.pinned([1]):
        language_loss(run).backward()  # and training variants still run after it
