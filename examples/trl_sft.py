"""Fine-tune a small Llama with LoRA on text, by TRL's ``SFTTrainer``, with DropBP: four lines of it are about dropping.

The text is the source of Python's own standard library, a token for each byte, so nothing is downloaded.
``python examples/trl_sft.py`` takes less than a minute on a CPU; ``pip install 'dropbp-fx[trl]'`` installs what it needs.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dropbp_fx import DropPolicy, dropbp_backend

try:
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    from dropbp_fx.integrations.transformers import DropBPCallback
except ImportError as error:
    sys.exit(f"This example needs the package {error.name!r}. Install the extra: pip install 'dropbp-fx[trl]'")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and one for the end of a text."""
    alphabet = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet | {"<end>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def texts(count: int) -> Dataset:
    """The beginnings of modules of the standard library."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return Dataset.from_dict(
        {"text": [file.read_text(encoding="utf-8", errors="ignore")[:1000] for file in files[:count]]}
    )


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """The loss as SFTTrainer computes it, from the log-probabilities of its own output layer."""
    outputs = model(**batch, use_cache=False, fused_lm_head=True)
    return -outputs.log_probs.sum() / outputs.label_mask.sum()


def main(argv: Sequence[str] | None = None) -> SFTTrainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--inner", default="aot_eager", help="what compiles: aot_eager (quick start) or inductor")
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=257, use_cache=False))
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))

    policy = DropPolicy(0.5, schedule="ramp_up", allocation="sensitivity")
    backend = dropbp_backend(policy=policy, seed=0, inner=options.inner)  # 1.
    model.compile(backend=backend)  # 2. in place: the Trainer sees the model it knows
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                max_steps=options.steps,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                learning_rate=1e-2,
                max_length=128,
                packing=True,  # all batches have one shape
                logging_steps=max(1, options.steps // 4),
                save_strategy="no",
                report_to="none",
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                seed=0,
            ),
            train_dataset=texts(60),
            processing_class=byte_tokenizer(),
            callbacks=[DropBPCallback(backend, calibrate_at=0.25, loss=loss_of)],  # 3.
        )
        trainer.train()
    print(backend.sensitivity)  # 4.
    print(f"{backend.stats.realised_rate:.3f} of the branches were dropped over {backend.stats.forwards} forwards")
    return trainer


if __name__ == "__main__":
    main()
