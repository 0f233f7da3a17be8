"""The families of models the tests train: tiny, random, each with its branches written down from reading its source.

:data:`FAMILIES` is data. ``tests/test_matrix.py`` runs it, ``docs/compatibility.md`` shows it, and a test holds the two
together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.oracle import DetachPoint

IDS = torch.arange(16).reshape(2, 8) * 7 % 59 + 3  # 0 to 2 are padding, beginning and end
IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32).sin()
LABELS = torch.tensor([0, 1])
SOUND = torch.linspace(-20, 20, 2 * 200).reshape(2, 200).sin()
SPECTRUM = torch.linspace(-5, 5, 2 * 8 * 20).reshape(2, 8, 20).sin()

SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = {**SIZE, "num_key_value_heads": 2}
GPT: dict[str, Any] = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 16,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEQ2SEQ: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 16,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 16,
}
SPEECH: dict[str, Any] = {
    **SIZE,
    "conv_dim": (8, 8),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
}
MAMBA: dict[str, Any] = {"mamba_d_state": 4, "mamba_d_conv": 3, "mamba_expand": 2}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Makes a small model with random weights and every kind of dropout turned off."""

    model: type[Any]
    config: type[Any]
    settings: dict[str, Any]
    freeze: str | None = None

    def __call__(self, **changes: Any) -> nn.Module:
        config = self.config(**{**self.settings, **changes})
        for part in (config, *(getattr(config, f"{kind}_config", None) for kind in ("text", "vision"))):
            for name, value in list(vars(part).items()) if part is not None else ():
                if "drop" in name and isinstance(value, float):
                    setattr(part, name, 0.0)
        model: nn.Module = self.model(config)
        if self.freeze is not None:
            getattr(model, self.freeze)()
        return model


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: what it is called in the tests and in the documentation.
        kind: decoder, encoder, ...
        build: makes a small model.
        loss: runs the model, or the compiled one, and returns a scalar.
        branches: for each residual branch, in execution order, its name and where an eager model detaches it.
        layer: the branches of one layer, in words.
        note: what a user should know.
    """

    name: str
    kind: str
    build: Recipe
    loss: Callable[[Any], Tensor]
    branches: dict[str, DetachPoint]
    layer: str = "attention, MLP"
    note: str = ""


def made(model: type[Any], config: type[Any], *, freeze: str | None = None, **settings: Any) -> Recipe:
    """A recipe; ``freeze`` names a method of the model that freezes the part that fine-tuning leaves alone."""
    return Recipe(model, config, settings, freeze)


def language_loss(model: Any) -> Tensor:
    return model(input_ids=IDS, labels=IDS).loss


def short_language_loss(model: Any) -> Tensor:
    """For models that run over the sequence step by step: every step is part of the graph."""
    return model(input_ids=IDS[:, :3], labels=IDS[:, :3]).loss


def image_loss(model: Any) -> Tensor:
    return model(pixel_values=IMAGES, labels=LABELS).loss


def contrastive_loss(model: Any) -> Tensor:
    return model(input_ids=IDS, pixel_values=IMAGES, return_loss=True).loss


def sound_loss(model: Any) -> Tensor:
    return model(input_values=SOUND, labels=LABELS).loss


def speech_loss(model: Any) -> Tensor:
    return model(input_features=SPECTRUM, labels=IDS).loss


def caption_loss(model: Any) -> Tensor:
    ids = torch.cat([torch.full((2, 4), 63), IDS], 1)  # four image tokens, one for each patch
    return model(input_ids=ids, pixel_values=IMAGES, labels=ids).loss


ATTENTION_MLP = ("self_attn", "mlp")


def each(path: str, parts: dict[str, str] | tuple[str, ...] = ATTENTION_MLP, count: int = 2) -> dict[str, DetachPoint]:
    """The branches of ``count`` layers at ``path.0``, ``path.1``, ...; a tuple detaches each where its name says."""
    named = parts if isinstance(parts, dict) else dict(zip(parts, parts, strict=True))
    return {f"{path}.{i}.{name}": f"{path}.{i}.{point}" for i in range(count) for name, point in named.items()}


def below(path: str, branches: dict[str, Any]) -> dict[str, DetachPoint]:
    """``branches`` of a part at ``path`` whose graph Dynamo makes by itself: their names start at that part."""
    return {name: f"{path}.{point}" for name, point in branches.items()}


LLAMA_LIKE = each("model.layers")
POST_NORMED = {"self_attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
BERT_LIKE = {"attention.self+output": "attention.output.dense", "intermediate+output": "output.dense"}
FC = {"self_attn": "self_attn", "fc1+fc2": "fc2"}
CROSS_FC = {"self_attn": "self_attn", "encoder_attn": "encoder_attn", "fc1+fc2": "fc2"}
BART_LIKE = {**each("model.encoder.layers", FC), **each("model.decoder.layers", CROSS_FC)}
VIT_LIKE = ("attention", "mlp")
MOE: dict[str, Any] = {"num_experts_per_tok": 2}
PART = "names start at the part of the model that Dynamo compiles by itself"
FREEZE = f"With freeze_feature_encoder(), as is usual; {PART}."
CROSS = "encoder: attention, MLP; decoder: attention, cross-attention, MLP"


def t5_branches() -> dict[str, DetachPoint]:
    kinds = {
        "encoder": ("SelfAttention", "DenseReluDense"),
        "decoder": ("SelfAttention", "EncDecAttention", "DenseReluDense"),
    }
    names = [
        f"{stack}.block.{block}.layer.{number}.{kind}"
        for stack, sublayers in kinds.items()
        for block in range(2)
        for number, kind in enumerate(sublayers)
    ]
    return {name: name for name in names}


def albert_branches() -> dict[str, DetachPoint]:
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    found: dict[str, DetachPoint] = {}
    for call in range(2):
        found[f"{layer}.attention.query+key+value+dense#{call + 1}"] = (f"{layer}.attention.dense", call)
        found[f"{layer}.ffn+ffn_output#{call + 1}"] = (f"{layer}.ffn_output", call)
    return found


def falcon_branches() -> dict[str, DetachPoint]:
    # No module puts out the sum of both, so an eager model detaches each.
    layers = [f"transformer.h.{i}" for i in range(2)]
    return {f"{layer}.self_attention+mlp": [f"{layer}.self_attention", f"{layer}.mlp"] for layer in layers}


def beit_branches() -> dict[str, DetachPoint]:
    # One drop_path module, an identity here, serves both branches of a layer.
    return {
        f"beit.layers.{i}.{part}": (f"beit.layers.{i}.drop_path", call)
        for i in range(2)
        for call, part in enumerate(VIT_LIKE)
    }


def clip_branches() -> dict[str, DetachPoint]:
    return {**each("vision_model.encoder.layers"), **each("text_model.encoder.layers")}


def llava_branches() -> dict[str, DetachPoint]:
    return below("model", {**each("vision_tower.encoder.layers"), **each("language_model.layers")})


def speech_branches(root: str) -> dict[str, DetachPoint]:
    layers = each("encoder.layers", ("attention", "feed_forward"))
    return below(root, {"encoder.pos_conv_embed.conv": "encoder.pos_conv_embed", **layers})


FAMILIES: tuple[Family, ...] = (
    # Decoders of text. Keys and values leave the graph: use_cache is on by default.
    Family("Llama", "decoder", made(hf.LlamaForCausalLM, hf.LlamaConfig, **GROUPED), language_loss, LLAMA_LIKE),
    Family(
        "Mistral",
        "decoder",
        made(hf.MistralForCausalLM, hf.MistralConfig, **GROUPED, head_dim=8, sliding_window=4),
        language_loss,
        LLAMA_LIKE,
    ),
    Family("Qwen2", "decoder", made(hf.Qwen2ForCausalLM, hf.Qwen2Config, **GROUPED), language_loss, LLAMA_LIKE),
    Family(
        "Qwen3", "decoder", made(hf.Qwen3ForCausalLM, hf.Qwen3Config, **GROUPED, head_dim=8), language_loss, LLAMA_LIKE
    ),
    Family(
        "Gemma", "decoder", made(hf.GemmaForCausalLM, hf.GemmaConfig, **GROUPED, head_dim=8), language_loss, LLAMA_LIKE
    ),
    Family(
        "Gemma 2",
        "decoder",
        made(hf.Gemma2ForCausalLM, hf.Gemma2Config, **GROUPED, head_dim=8, sliding_window=4),
        language_loss,
        each("model.layers", POST_NORMED),
        note="A norm behind each branch belongs to it.",
    ),
    Family(
        "Gemma 3 (text)",
        "decoder",
        made(
            hf.Gemma3ForCausalLM,
            hf.Gemma3TextConfig,
            **GROUPED,
            head_dim=8,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        ),
        language_loss,
        each("model.layers", POST_NORMED),
        note="A norm behind each branch belongs to it.",
    ),
    Family(
        "Phi",
        "decoder",
        made(hf.PhiForCausalLM, hf.PhiConfig, **GROUPED),
        language_loss,
        LLAMA_LIKE,
        layer="attention and MLP in parallel",
    ),
    Family("Phi-3", "decoder", made(hf.Phi3ForCausalLM, hf.Phi3Config, **GROUPED), language_loss, LLAMA_LIKE),
    Family(
        "GPT-2",
        "decoder",
        made(hf.GPT2LMHeadModel, hf.GPT2Config, **GPT),
        language_loss,
        each("transformer.h", ("attn", "mlp")),
        note="Tied embeddings.",
    ),
    Family(
        "GPT-NeoX",
        "decoder",
        made(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, **SIZE),
        language_loss,
        each("gpt_neox.layers", ("attention", "mlp")),
        layer="attention and MLP in parallel",
    ),
    Family(
        "GPT-J",
        "decoder",
        made(hf.GPTJForCausalLM, hf.GPTJConfig, **GPT, rotary_dim=4),
        language_loss,
        each("transformer.h", ("attn", "mlp")),
        layer="attention and MLP in parallel",
    ),
    Family(
        "Falcon",
        "decoder",
        made(hf.FalconForCausalLM, hf.FalconConfig, **{k: v for k, v in SIZE.items() if k != "intermediate_size"}),
        language_loss,
        falcon_branches(),
        layer="attention and MLP together",
        note="They are one branch: a dropout stands between their sum and the stream.",
    ),
    Family(
        "OPT",
        "decoder",
        made(hf.OPTForCausalLM, hf.OPTConfig, **SIZE, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=16),
        language_loss,
        each("model.decoder.layers", FC),
    ),
    Family(
        "BLOOM",
        "decoder",
        made(hf.BloomForCausalLM, hf.BloomConfig, hidden_size=32, n_layer=2, n_head=4, vocab_size=64),
        language_loss,
        each(
            "transformer.h",
            {
                "self_attention.query_key_value+dense": "self_attention.dense",
                "mlp.dense_h_to_4h+dense_4h_to_h": "mlp.dense_4h_to_h",
            },
        ),
    ),
    Family(
        "Cohere",
        "decoder",
        made(hf.CohereForCausalLM, hf.CohereConfig, **GROUPED),
        language_loss,
        LLAMA_LIKE,
        layer="attention and MLP in parallel",
    ),
    Family(
        "StableLM", "decoder", made(hf.StableLmForCausalLM, hf.StableLmConfig, **GROUPED), language_loss, LLAMA_LIKE
    ),
    Family("OLMo", "decoder", made(hf.OlmoForCausalLM, hf.OlmoConfig, **GROUPED), language_loss, LLAMA_LIKE),
    Family(
        "OLMo 2",
        "decoder",
        made(hf.Olmo2ForCausalLM, hf.Olmo2Config, **GROUPED),
        language_loss,
        each("model.layers", POST_NORMED),
        note="A norm behind each branch belongs to it.",
    ),
    Family(
        "StarCoder2",
        "decoder",
        made(hf.Starcoder2ForCausalLM, hf.Starcoder2Config, **GROUPED),
        language_loss,
        LLAMA_LIKE,
    ),
    Family(
        "Granite",
        "decoder",
        made(hf.GraniteForCausalLM, hf.GraniteConfig, **GROUPED, residual_multiplier=0.5),
        language_loss,
        LLAMA_LIKE,
        note="The branch is scaled before it is added.",
    ),
    Family("SmolLM3", "decoder", made(hf.SmolLM3ForCausalLM, hf.SmolLM3Config, **GROUPED), language_loss, LLAMA_LIKE),
    # Mixtures of experts.
    Family(
        "GPT-OSS",
        "mixture of experts",
        made(
            hf.GptOssForCausalLM, hf.GptOssConfig, **GROUPED, **MOE, head_dim=8, num_local_experts=4, sliding_window=4
        ),
        language_loss,
        LLAMA_LIKE,
        layer="attention, experts",
    ),
    Family(
        "Mixtral",
        "mixture of experts",
        made(hf.MixtralForCausalLM, hf.MixtralConfig, **GROUPED, **MOE, num_local_experts=4),
        language_loss,
        LLAMA_LIKE,
        layer="attention, experts",
    ),
    Family(
        "Qwen2-MoE",
        "mixture of experts",
        made(
            hf.Qwen2MoeForCausalLM,
            hf.Qwen2MoeConfig,
            **GROUPED,
            **MOE,
            num_experts=4,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=24,
        ),
        language_loss,
        LLAMA_LIKE,
        layer="attention, experts with the shared one",
    ),
    Family(
        "Qwen3-MoE",
        "mixture of experts",
        made(
            hf.Qwen3MoeForCausalLM,
            hf.Qwen3MoeConfig,
            **GROUPED,
            **MOE,
            head_dim=8,
            num_experts=4,
            moe_intermediate_size=24,
        ),
        language_loss,
        LLAMA_LIKE,
        layer="attention, experts",
    ),
    Family(
        "DeepSeek-V2",
        "mixture of experts",
        made(
            hf.DeepseekV2ForCausalLM,
            hf.DeepseekV2Config,
            **SIZE,
            **MOE,
            n_routed_experts=4,
            n_shared_experts=1,
            moe_intermediate_size=24,
            first_k_dense_replace=1,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
        ),
        language_loss,
        {
            **each("model.layers", count=1),
            "model.layers.1.self_attn": "model.layers.1.self_attn",
            "model.layers.1.mlp.gate+experts": "model.layers.1.mlp.experts",
            "model.layers.1.mlp.shared_experts": "model.layers.1.mlp.shared_experts",
        },
        layer="attention, then MLP, or routed and shared experts in parallel",
    ),
    Family(
        "DeepSeek-V3",
        "mixture of experts",
        made(
            hf.DeepseekV3ForCausalLM,
            hf.DeepseekV3Config,
            **SIZE,
            **MOE,
            n_routed_experts=4,
            n_shared_experts=1,
            n_group=2,
            topk_group=1,
            moe_intermediate_size=24,
            first_k_dense_replace=1,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
        ),
        language_loss,
        {
            **each("model.layers", count=1),
            "model.layers.1.self_attn": "model.layers.1.self_attn",
            "model.layers.1.mlp.gate+experts": "model.layers.1.mlp.experts",
            "model.layers.1.mlp.shared_experts": "model.layers.1.mlp.shared_experts",
        },
        layer="attention, then MLP, or routed and shared experts in parallel",
    ),
    # State spaces, and mixtures of them with attention.
    Family(
        "Mamba",
        "state space",
        made(
            hf.MambaForCausalLM,
            hf.MambaConfig,
            hidden_size=32,
            num_hidden_layers=2,
            vocab_size=64,
            state_size=4,
            time_step_rank=4,
        ),
        short_language_loss,
        each("backbone.layers", ("mixer",)),
        layer="mixer",
    ),
    Family(
        "Mamba-2",
        "state space",
        made(
            hf.Mamba2ForCausalLM,
            hf.Mamba2Config,
            hidden_size=32,
            num_hidden_layers=2,
            vocab_size=64,
            state_size=4,
            num_heads=4,
            head_dim=16,
            n_groups=1,
            chunk_size=4,
            pad_token_id=0,
        ),
        language_loss,
        each("backbone.layers", ("mixer",)),
        layer="mixer",
    ),
    Family(
        "RecurrentGemma",
        "state space",
        made(
            hf.RecurrentGemmaForCausalLM,
            hf.RecurrentGemmaConfig,
            **GROUPED,
            lru_width=32,
            attention_window_size=4,
            block_types=["recurrent", "attention"],
        ),
        short_language_loss,
        each("model.layers", ("temporal_block", "mlp_block")),
        layer="recurrence or attention, MLP",
    ),
    Family(
        "Falcon-H1",
        "state space",
        made(
            hf.FalconH1ForCausalLM,
            hf.FalconH1Config,
            **GROUPED,
            **MAMBA,
            mamba_d_ssm=32,
            mamba_n_heads=4,
            mamba_d_head=8,
            mamba_chunk_size=4,
        ),
        language_loss,
        each("model.layers", ("mamba", "self_attn", "feed_forward")),
        layer="mixer and attention in parallel, MLP",
    ),
    Family(
        "Jamba",
        "state space",
        made(
            hf.JambaForCausalLM,
            hf.JambaConfig,
            **GROUPED,
            **MAMBA,
            **MOE,
            mamba_dt_rank=4,
            num_experts=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            use_mamba_kernels=False,
            use_associative_scan=False,
        ),
        short_language_loss,
        {
            **each("model.layers", ("mamba", "feed_forward"), 1),
            "model.layers.1.self_attn": "model.layers.1.self_attn",
            "model.layers.1.feed_forward": "model.layers.1.feed_forward",
        },
        layer="mixer or attention, MLP or experts",
    ),
    Family(
        "Zamba",
        "state space",
        made(
            hf.ZambaForCausalLM,
            hf.ZambaConfig,
            **{**GROUPED, "num_hidden_layers": 3},
            **MAMBA,
            attention_hidden_size=64,
            attention_head_dim=16,
            mamba_dt_rank=4,
            n_mamba_heads=2,
            layers_block_type=["linear_attention", "hybrid", "hybrid"],
            use_mamba_kernels=False,
            use_associative_scan=False,
        ),
        short_language_loss,
        {
            "model.layers.0.mamba": "model.layers.0.mamba",
            **{
                f"model.layers.{i}.shared_transf+linear+mamba_decoder": f"model.layers.{i}.mamba_decoder.mamba"
                for i in (1, 2)
            },
        },
        layer="mixer, with the shared attention and MLP in front of it where there is one",
    ),
    Family(
        "RWKV",
        "state space",
        made(
            hf.RwkvForCausalLM,
            hf.RwkvConfig,
            hidden_size=32,
            num_hidden_layers=2,
            attention_hidden_size=32,
            intermediate_size=48,
            vocab_size=64,
            context_length=16,
        ),
        short_language_loss,
        each("rwkv.blocks", ("attention", "feed_forward")),
        layer="time mixing, channel mixing",
    ),
    # Encoders of text.
    Family(
        "BERT",
        "encoder",
        made(hf.BertForMaskedLM, hf.BertConfig, **SIZE),
        language_loss,
        each("bert.encoder.layer", BERT_LIKE),
        note="The norm stands behind the add.",
    ),
    Family(
        "RoBERTa",
        "encoder",
        made(hf.RobertaForMaskedLM, hf.RobertaConfig, **SIZE, max_position_embeddings=16),
        language_loss,
        each("roberta.encoder.layer", BERT_LIKE),
        note="The norm stands behind the add.",
    ),
    Family(
        "XLM-RoBERTa",
        "encoder",
        made(hf.XLMRobertaForMaskedLM, hf.XLMRobertaConfig, **SIZE, max_position_embeddings=16),
        language_loss,
        each("roberta.encoder.layer", BERT_LIKE),
        note="The norm stands behind the add.",
    ),
    Family(
        "DeBERTa-v2",
        "encoder",
        made(
            hf.DebertaV2ForMaskedLM,
            hf.DebertaV2Config,
            **SIZE,
            relative_attention=True,
            position_buckets=4,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            max_position_embeddings=16,
        ),
        language_loss,
        each("deberta.encoder.layer", BERT_LIKE),
        note="The norm stands behind the add.",
    ),
    Family(
        "ModernBERT",
        "encoder",
        made(
            hf.ModernBertForMaskedLM,
            hf.ModernBertConfig,
            **SIZE,
            layer_types=["full_attention", "sliding_attention"],
            local_attention=4,
            cls_token_id=1,
            sep_token_id=2,
        ),
        language_loss,
        each("model.layers", ("attn", "mlp")),
    ),
    Family(
        "ALBERT",
        "encoder",
        made(hf.AlbertForMaskedLM, hf.AlbertConfig, **SIZE, embedding_size=16),
        language_loss,
        albert_branches(),
        note="All layers share one set of weights; a layer's branches are told apart by a number.",
    ),
    Family(
        "ELECTRA",
        "encoder",
        made(hf.ElectraForMaskedLM, hf.ElectraConfig, **SIZE, embedding_size=16),
        language_loss,
        each("electra.encoder.layer", BERT_LIKE),
        note="The norm stands behind the add.",
    ),
    Family(
        "DistilBERT",
        "encoder",
        made(
            hf.DistilBertForMaskedLM,
            hf.DistilBertConfig,
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=48,
            vocab_size=64,
            max_position_embeddings=16,
        ),
        language_loss,
        each("distilbert.transformer.layer", ("attention", "ffn")),
        note="The norm stands behind the add.",
    ),
    # Encoder-decoders.
    Family(
        "T5",
        "encoder-decoder",
        made(
            hf.T5ForConditionalGeneration,
            hf.T5Config,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            vocab_size=64,
            decoder_start_token_id=0,
        ),
        language_loss,
        t5_branches(),
        layer=CROSS,
        note="A position bias made in the first layer is used by all.",
    ),
    Family(
        "BART",
        "encoder-decoder",
        made(hf.BartForConditionalGeneration, hf.BartConfig, **SEQ2SEQ),
        language_loss,
        BART_LIKE,
        layer=CROSS,
        note="The norm stands behind the add.",
    ),
    Family(
        "mBART",
        "encoder-decoder",
        made(hf.MBartForConditionalGeneration, hf.MBartConfig, **SEQ2SEQ),
        language_loss,
        BART_LIKE,
        layer=CROSS,
    ),
    Family(
        "Pegasus",
        "encoder-decoder",
        made(hf.PegasusForConditionalGeneration, hf.PegasusConfig, **SEQ2SEQ),
        language_loss,
        BART_LIKE,
        layer=CROSS,
    ),
    Family(
        "Whisper",
        "encoder-decoder",
        made(
            hf.WhisperForConditionalGeneration,
            hf.WhisperConfig,
            **{k: v for k, v in SEQ2SEQ.items() if k not in ("max_position_embeddings", "forced_eos_token_id")},
            num_mel_bins=8,
            max_source_positions=10,
            max_target_positions=16,
        ),
        speech_loss,
        BART_LIKE,
        layer=CROSS,
    ),
    # Vision.
    Family(
        "ViT",
        "vision",
        made(hf.ViTForImageClassification, hf.ViTConfig, **VISION),
        image_loss,
        each("vit.layers", VIT_LIKE),
    ),
    Family(
        "DeiT",
        "vision",
        made(hf.DeiTForImageClassification, hf.DeiTConfig, **VISION),
        image_loss,
        each("deit.layers", VIT_LIKE),
    ),
    Family(
        "BEiT",
        "vision",
        made(hf.BeitForImageClassification, hf.BeitConfig, **VISION, use_relative_position_bias=True),
        image_loss,
        beit_branches(),
        note="Layer scale belongs to the branch.",
    ),
    Family(
        "DINOv2",
        "vision",
        made(hf.Dinov2ForImageClassification, hf.Dinov2Config, **VISION),
        image_loss,
        each("dinov2.encoder.layer", {"attention": "layer_scale1", "mlp": "layer_scale2"}),
        note="Layer scale belongs to the branch.",
    ),
    Family(
        "Swin",
        "vision",
        made(
            hf.SwinForImageClassification,
            hf.SwinConfig,
            image_size=32,
            patch_size=4,
            embed_dim=8,
            depths=[2, 1],
            num_heads=[2, 2],
            window_size=4,
        ),
        image_loss,
        {
            **each("swin.encoder.layers.0.blocks", VIT_LIKE),
            **each("swin.encoder.layers.1.blocks", VIT_LIKE, 1),
        },
    ),
    Family(
        "SegFormer",
        "vision",
        made(
            hf.SegformerForImageClassification,
            hf.SegformerConfig,
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[8, 16],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
        ),
        image_loss,
        {
            **each("segformer.stages.0.blocks", VIT_LIKE, 1),
            **each("segformer.stages.1.blocks", VIT_LIKE, 1),
        },
    ),
    Family(
        "ConvNeXt",
        "vision",
        made(hf.ConvNextForImageClassification, hf.ConvNextConfig, num_stages=2, hidden_sizes=[8, 16], depths=[1, 2]),
        image_loss,
        {
            **each("convnext.encoder.stages.0.layers", {"dwconv+pwconv1+pwconv2": "drop_path"}, 1),
            **each("convnext.encoder.stages.1.layers", {"dwconv+pwconv1+pwconv2": "drop_path"}),
        },
        layer="the block",
        note="Layer scale belongs to the branch.",
    ),
    Family(
        "ResNet",
        "vision",
        made(
            hf.ResNetForImageClassification,
            hf.ResNetConfig,
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[2, 2],
            layer_type="basic",
        ),
        image_loss,
        {
            **each("resnet.encoder.stages.0.layers", ("layer",)),
            "resnet.encoder.stages.1.layers.1.layer": "resnet.encoder.stages.1.layers.1.layer",
        },
        layer="the block",
        note="A block whose shortcut is a projection is no branch: the stream does not pass it unchanged.",
    ),
    # Several modalities.
    Family(
        "CLIP",
        "multimodal",
        made(
            hf.CLIPModel,
            hf.CLIPConfig,
            text_config={**SIZE, "max_position_embeddings": 16},
            vision_config=VISION,
            projection_dim=16,
        ),
        contrastive_loss,
        clip_branches(),
    ),
    Family(
        "SigLIP",
        "multimodal",
        made(
            hf.SiglipModel,
            hf.SiglipConfig,
            text_config={**SIZE, "max_position_embeddings": 8, "projection_size": 32},
            vision_config=VISION,
        ),
        contrastive_loss,
        {
            **each("vision_model.encoder.layers"),
            "vision_model.head.mlp": "vision_model.head.mlp",
            **each("text_model.encoder.layers"),
        },
        note="The pooling head's MLP is a branch too.",
    ),
    Family(
        "LLaVA",
        "multimodal",
        made(
            hf.LlavaForConditionalGeneration,
            hf.LlavaConfig,
            text_config=hf.LlamaConfig(**GROUPED),
            vision_config=hf.CLIPVisionConfig(**VISION),
            image_token_index=63,
            image_seq_length=4,
            vision_feature_layer=-1,
        ),
        caption_loss,
        llava_branches(),
        note=f"Dynamo breaks the graph: {PART}.",
    ),
    # Sound.
    Family(
        "Wav2Vec2",
        "audio",
        made(hf.Wav2Vec2ForSequenceClassification, hf.Wav2Vec2Config, **SPEECH, freeze="freeze_feature_encoder"),
        sound_loss,
        speech_branches("wav2vec2"),
        layer="attention, MLP; the convolution that makes positions",
        note=FREEZE,
    ),
    Family(
        "HuBERT",
        "audio",
        made(hf.HubertForSequenceClassification, hf.HubertConfig, **SPEECH, freeze="freeze_feature_encoder"),
        sound_loss,
        speech_branches("hubert"),
        layer="attention, MLP; the convolution that makes positions",
        note=FREEZE,
    ),
)


def family(name: str) -> Family:
    """The family called ``name``."""
    return next(entry for entry in FAMILIES if entry.name == name)
