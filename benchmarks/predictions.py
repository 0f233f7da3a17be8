"""``python -m benchmarks.predictions``: what ``dropbp_fx.explain`` predicts against what is measured.

FLOPs are measured by ``torch.utils.flop_counter`` on the eager model with the dropped branches detached, saved bytes by
autograd's hooks on the compiled model. With ``--results`` the predicted ratio of step costs is held against step times in
a file that ``python -m benchmarks run --out`` wrote, and the predicted savings against its activation memory.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import CPU_ATTENTION
from benchmarks.results import load
from benchmarks.suites import SUITES, build
from dropbp_fx import dropbp_backend, explain

VOCABULARY = 512


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=384,
            vocab_size=VOCABULARY,
        )
    )


def t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            d_model=128,
            d_kv=32,
            d_ff=384,
            num_layers=3,
            num_heads=4,
            vocab_size=VOCABULARY,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )


def vit() -> nn.Module:
    return hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=384,
            image_size=64,
            patch_size=8,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def language_inputs() -> dict[str, Tensor]:
    ids = torch.arange(4 * 128).reshape(4, 128) * 7 % VOCABULARY
    return {"input_ids": ids, "labels": ids}


def image_inputs() -> dict[str, Tensor]:
    return {"pixel_values": torch.linspace(-1, 1, 8 * 3 * 64 * 64).reshape(8, 3, 64, 64), "labels": torch.arange(8) % 2}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "llama": (llama, language_inputs),
    "t5": (t5, language_inputs),
    "vit": (vit, image_inputs),
}


def patterns(branches: int) -> dict[str, list[int]]:
    """By label, the indices of the branches dropped."""
    return {
        "nothing": [],
        "every third": list(range(0, branches, 3)),
        "every second": list(range(1, branches, 2)),
        "all but one": [index for index in range(branches) if index != branches // 2],
    }


def check(name: str, inner: str, labels: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Predicted and measured figures of one model for a few patterns, those of :func:`patterns` called ``labels`` or all."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    build, inputs_of = MODELS[name]
    model, inputs = build().train(), inputs_of()
    backend = dropbp_backend(0.5, inner=inner)
    explanation = explain(model, **inputs, backend=backend)
    run = torch.compile(model, backend=backend)
    rows = []
    for label, dropped in patterns(len(explanation.branches)).items():
        if labels and label not in labels:
            continue
        predicted = explanation.cost_of(dropped)
        names = [explanation.branches[index].name for index in dropped]
        with backend.pinned(dropped):
            saved = measured_saved_bytes(model, lambda: run(**inputs).loss, list(inputs.values()))
        rows.append(
            {
                "model": name,
                "inner": inner,
                "dropped": label,
                "predicted_flops": predicted.forward_flops + predicted.backward_flops,
                "measured_flops": measured_flops(model, names, inputs),
                "predicted_bytes": predicted.saved_bytes,
                "measured_bytes": saved,
            }
        )
    return rows


def measured_flops(model: nn.Module, dropped: Sequence[str], inputs: dict[str, Tensor]) -> int:
    """FLOPs of an eager forward and backward with the modules called ``dropped`` detached."""
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with _detached(model, dropped), counter:
        model(**inputs).loss.backward()
    model.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


@contextlib.contextmanager
def _detached(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    def detach(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (output[0].detach(), *output[1:]) if isinstance(output, tuple) else output.detach()

    hooks = [model.get_submodule(name).register_forward_hook(detach) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def measured_saved_bytes(model: nn.Module, loss: Callable[[], Tensor], inputs: Sequence[Tensor]) -> int:
    """Bytes that a forward keeps for its backward, parameters and inputs not counted, each piece of memory once."""
    loss().backward()  # compiles
    tensors = (*model.parameters(), *model.buffers(), *inputs)
    own = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()
    value.backward()
    model.zero_grad(set_to_none=True)
    return sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in own)


@dataclasses.dataclass(frozen=True)
class _Measured:
    """Step times and activation memory by drop rate, from one run; rate 0 is torch.compile."""

    suite: str
    loss: str
    rates: dict[float, dict[str, float]]


def _measured(path: Path) -> list[_Measured]:
    """What a file of results says about training steps; the first files had another format."""
    content = json.loads(path.read_text())
    compared = ("torch.compile", "dropbp_fx")
    if "results" in content:
        results = [result for result in content["results"] if result["method"] in compared]
        rates = {float(rate): figures for result in results for rate, figures in result["rates"].items()}
        return [_Measured(results[0]["shape"], "plain", rates)]
    found: dict[tuple[int, str, str], dict[float, dict[str, float]]] = {}
    for number, run in enumerate(load(path)):
        for method in compared[::-1]:
            for record in run.figures("steps", method=method):
                rates = found.setdefault((number, record["suite"], record["loss_function"]), {})
                rates[record["value"] or 0.0] = record
    return [_Measured(suite, loss, rates) for (_, suite, loss), rates in found.items()]


def compare_results(path: Path) -> list[dict[str, Any]]:
    """Predicted against measured ratios for every rate of dropbp_fx in a file of results."""
    rows = []
    for measured in _measured(path):
        shape = SUITES[measured.suite]
        model = build(shape, device="meta", dtype=torch.bfloat16, fused_loss=measured.loss == "fused")
        explanation = explain(model, torch.zeros(shape.batch, shape.tokens + 1, dtype=torch.long, device="meta"))
        full, gib, base = explanation.predict(0.0), 2**30, measured.rates[0.0]
        for rate, figures in sorted(measured.rates.items()):
            if not rate:
                continue
            predicted = explanation.predict(rate)
            rows.append(
                {
                    "shape": measured.suite if measured.loss == "plain" else f"{measured.suite}, {measured.loss} loss",
                    "rate": rate,
                    "predicted_ratio": predicted.relative_cost,
                    "measured_ratio": figures["step_ms"] / base["step_ms"],
                    "predicted_gib": (full.saved_bytes - predicted.saved_bytes) / gib,
                    "measured_gib": base["activation_gib"] - figures["activation_gib"],
                }
            )
    return rows


def error(predicted: float, measured: float) -> str:
    """In percent of what was measured."""
    return f"{100 * (predicted - measured) / measured:+.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.predictions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--inner", choices=["inductor", "aot_eager"], default="inductor")
    parser.add_argument("--results", nargs="*", type=Path, default=[], help="files that python -m benchmarks wrote")
    arguments = parser.parse_args()
    rows = [row for name in arguments.models for row in check(name, arguments.inner)]
    if rows:
        table = [
            [
                row["model"],
                row["dropped"],
                f"{row['predicted_flops'] / 1e9:.3f}",
                f"{row['measured_flops'] / 1e9:.3f}",
                error(row["predicted_flops"], row["measured_flops"]),
                f"{row['predicted_bytes'] / 2**20:.3f}",
                f"{row['measured_bytes'] / 2**20:.3f}",
                error(row["predicted_bytes"], row["measured_bytes"]),
            ]
            for row in rows
        ]
        headers = [
            "model",
            "dropped",
            "GFLOPs, predicted",
            "measured",
            "error, %",
            "saved MiB, predicted",
            "measured",
            "error, %",
        ]
        print(tabulate(table, headers, tablefmt="github", disable_numparse=True))
    against = [row for path in arguments.results for row in compare_results(path)]
    if against:
        table = [
            [
                row["shape"],
                f"{row['rate']:g}",
                f"{row['predicted_ratio']:.3f}",
                f"{row['measured_ratio']:.3f}",
                error(row["predicted_ratio"], row["measured_ratio"]),
                f"{row['predicted_gib']:.2f}",
                f"{row['measured_gib']:.2f}",
                error(row["predicted_gib"], row["measured_gib"]),
            ]
            for row in against
        ]
        headers = ["shape", "rate", "step cost, predicted", "measured", "error, %"]
        headers += ["GiB saved, predicted", "measured", "error, %"]
        print(tabulate(table, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
