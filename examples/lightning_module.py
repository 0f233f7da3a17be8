"""Train a small Llama with PyTorch Lightning and DropBP: progress, logs and checkpoints are a module's hooks.

The text is the source of Python's own standard library, a token for each byte, so nothing is downloaded.
``python examples/lightning_module.py`` takes less than a minute on a CPU; ``pip install 'dropbp-fx[lightning]'`` installs
what it needs.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dropbp_fx import DropPolicy, dropbp_backend

try:
    import lightning
    from transformers import LlamaConfig, LlamaForCausalLM
except ImportError as error:
    sys.exit(f"This example needs the package {error.name!r}. Install the extra: pip install 'dropbp-fx[lightning]'")

TOKENS = 128


class LanguageModel(lightning.LightningModule):
    """What is about dropping is numbered; the rest is as always."""

    def __init__(self, inner: str = "aot_eager") -> None:
        super().__init__()
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
        self.model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=256, use_cache=False))
        self.backend = dropbp_backend(policy=DropPolicy(0.5, schedule="ramp_up"), seed=0, inner=inner)  # 1. the handle
        self.model.compile(backend=self.backend)  # 2. the model inside, not the LightningModule

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        steps = self.trainer.estimated_stepping_batches
        self.backend.progress = min(self.global_step / steps, 1.0)  # 3. optimizer steps move the schedule
        loss = self.model(input_ids=batch[0], labels=batch[0]).loss
        self.log("loss", loss)
        self.log("dropbp_rate", self.backend.stats.realised_rate)
        return loss

    def validation_step(self, batch: list[Tensor], batch_index: int) -> None:
        self.log("held_out_loss", self.model(input_ids=batch[0], labels=batch[0]).loss)  # never drops

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["dropbp_fx"] = self.backend.state_dict()  # 4. a resumed run draws what this one would have

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.backend.load_state_dict(checkpoint["dropbp_fx"])


def batches(module: str, count: int) -> torch.utils.data.DataLoader[Any]:
    """Stretches of the source of a module of the standard library, four in a batch."""
    data = torch.frombuffer(bytearray((Path(sysconfig.get_paths()["stdlib"]) / module).read_bytes()), dtype=torch.uint8)
    rows = data[: count * TOKENS].long().reshape(count, TOKENS)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows), batch_size=4)


def make_trainer(folder: str, steps: int) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=2,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,  # here a checkpoint is saved by hand
        num_sanity_val_steps=0,
    )


def main(argv: Sequence[str] | None = None) -> tuple[LanguageModel, LanguageModel]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--inner", default="aot_eager", help="what compiles: aot_eager (quick start) or inductor")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")

    train, held_out = batches("argparse.py", 4 * options.steps), batches("bisect.py", 16)
    with tempfile.TemporaryDirectory() as folder:  # half of the steps are one epoch
        lightning.seed_everything(0, verbose=False)
        first = LanguageModel(options.inner)
        trainer = make_trainer(folder, options.steps // 2)
        trainer.fit(first, train)
        trainer.save_checkpoint(f"{folder}/half.ckpt")

        second = LanguageModel(options.inner)
        trainer = make_trainer(folder, options.steps)
        trainer.fit(second, train, held_out, ckpt_path=f"{folder}/half.ckpt")
    print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})
    print(
        f"The rate began at 0 and is {second.backend.branches[0].rate:.3f} after {second.backend.stats.forwards} forwards"
    )
    return first, second


if __name__ == "__main__":
    main()
