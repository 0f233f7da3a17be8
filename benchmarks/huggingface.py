"""Models of transformers, with adapters of peft, trained as people train them: random weights, nothing is downloaded."""

from __future__ import annotations

import contextlib
import importlib.util

import torch
from torch import Tensor, nn

from benchmarks.models import Shape

#: Every linear layer of a Llama, as most recipes for LoRA name them.
_LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class HuggingFaceModel(nn.Module):
    """Takes what the benchmarks' own models take, token ids of shape (batch, tokens + 1), and returns the loss.

    Args:
        model: a causal language model of transformers, wrapped by peft or not.
        autocast: run it under autocast to bfloat16. The context is part of the forward and so of what is compiled, as in
            transformers' Trainer.
    """

    def __init__(self, model: nn.Module, *, autocast: bool) -> None:
        super().__init__()
        self.model, self.autocast = model, autocast

    def forward(self, ids: Tensor) -> Tensor:
        ids = ids[:, :-1]  # the model shifts labels itself
        autocast = torch.autocast(ids.device.type, torch.bfloat16) if self.autocast else contextlib.nullcontext()
        with autocast:
            return self.model(input_ids=ids, labels=ids, use_cache=False).loss


def check_installed(shape: Shape) -> None:
    """Do the packages that make the model exist?

    Raises:
        ImportError: they do not.
    """
    needed = ["transformers", *(["peft"] if shape.lora_rank else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"This suite trains a model of Hugging Face's and needs {' and '.join(needed)}; not installed here: "
            f"{', '.join(missing)}. Install the extra: pip install 'dropbp-fx[inspect]'."
        )


def make_model(shape: Shape, *, device: str, dtype: torch.dtype) -> HuggingFaceModel:
    """The same weights at every call.

    In bfloat16 it is mixed precision as people train: weights that are trained stay float32, frozen ones are bfloat16,
    peft makes adapters float32 beside those, and the forward runs under autocast. In float32 everything is float32.

    Raises:
        ImportError: transformers or peft is not installed.
    """
    check_installed(shape)
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    weights = dtype if shape.lora_rank else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(_config(shape), dtype=weights, attn_implementation="sdpa")
        # Of GPT-2 transformers does not know which loss to take, and warns in its forward before it takes this one;
        # Dynamo breaks the graph at the warning.
        model.loss_type = "ForCausalLM"
        if shape.lora_rank:
            model = _with_lora(model, shape.lora_rank)
    return HuggingFaceModel(model, autocast=dtype == torch.bfloat16)


def _config(shape: Shape) -> object:
    from transformers import GPT2Config, LlamaConfig

    if shape.family == "hf-gpt2":
        last = shape.vocabulary - 1
        return GPT2Config(
            n_layer=shape.layers,
            n_embd=shape.width,
            n_inner=shape.mlp,
            n_head=shape.heads,
            vocab_size=shape.vocabulary,
            n_positions=max(1024, shape.tokens),
            resid_pdrop=shape.dropout,
            embd_pdrop=shape.dropout,
            attn_pdrop=shape.dropout,
            bos_token_id=last,
            eos_token_id=last,
            use_cache=False,
        )
    return LlamaConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads or shape.heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=max(2048, shape.tokens),
        tie_word_embeddings=True,
        use_cache=False,
    )


def _with_lora(model: nn.Module, rank: int) -> nn.Module:
    import peft

    # Adapters become float32 by peft's default; alpha is twice the rank, which is usual; no dropout, peft's default.
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_LLAMA_LINEARS, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)
