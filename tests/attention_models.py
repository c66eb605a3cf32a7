"""Tiny random models of many families whose attention is patched, and the ways in which tests run them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache

from kompakt.compress.attention_calibration import observe_attention
from kompakt.compress.hf_attention import LayerAttention, attach, attached_layers, attention_modules
from kompakt.compress.hf_cache import CACHE
from kompakt.quant.method import AttentionPolicy

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
NINE = {"hidden_size": 288, "num_attention_heads": 9, "num_key_value_heads": 3}
FOURTEEN = {"hidden_size": 448, "num_attention_heads": 14, "num_key_value_heads": 2}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
MLA = {"n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
MLA |= {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12}
DECODERS = {
    "llama": NINE,
    "qwen2": FOURTEEN,
    "qwen3": FOURTEEN | {"head_dim": 32},
    "mistral": {"sliding_window": 7},
    "gemma2": {"head_dim": 16, "sliding_window": 7, "attn_logit_softcapping": 3.0},
    "gemma3_text": {"head_dim": 16, "sliding_window": 7},
    "phi": {"num_key_value_heads": 4},
    "phi3": {"sliding_window": 7},
    "gpt_oss": {"head_dim": 16, "sliding_window": 7, **EXPERTS},
    "deepseek_v3": {"num_key_value_heads": 4, "first_k_dense_replace": 2, **MLA},
}
ENCODERS = {"bert": {}, "modernbert": {"local_attention": 6, "global_attn_every_n_layers": 2}}
TOKENS = torch.randint(3, 128, (3, 23), generator=torch.Generator().manual_seed(1))
EPS = torch.finfo(torch.float32).eps


def tiny(family: str, *, eager: bool = True, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A tiny random model whose weights are large enough for an error of its attention to show."""
    options = {**SIZES, **(DECODERS | ENCODERS).get(family, {}), **settings}
    if family in ENCODERS:
        options |= {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    config = CONFIG_MAPPING[family](**options)
    make = AutoModel if family in ENCODERS else AutoModelForCausalLM
    torch.manual_seed(0)
    implementation = {"attn_implementation": "eager"} if eager else {}
    model = make.from_config(config, **implementation).to(dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
        elif "norm" in name.lower() and name.endswith("weight"):
            parameter.add_(torch.randn_like(parameter) * 0.2)
        else:
            parameter.normal_(0, 0.2)
    return model


def follow_one(model: Any, mode: str, min_tokens: int = 2) -> None:
    """Every attention layer in one arithmetic; "bf16" goes through the op as well."""
    policy = AttentionPolicy(mode, min_tokens)  # pyright: ignore[reportArgumentType]
    attach(model, {name: LayerAttention(policy, policy.mode, min_tokens) for name in attention_modules(model)})


def ways(model: Any) -> Counter[str]:
    """How calls went, over all layers."""
    return sum((layer.ran for layer in attached_layers(model).values()), Counter())


def output(model: Any, tokens: torch.Tensor = TOKENS, **options: Any) -> torch.Tensor:
    found = model(tokens, **options)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def padded(side: str) -> torch.Tensor:
    lengths = torch.tensor([[23], [14], [3]])
    positions = torch.arange(23)
    return ((positions < lengths) if side == "right" else (positions >= 23 - lengths)).long()


def plain(model: Any) -> torch.Tensor:
    return output(model, use_cache=False)


def left(model: Any) -> torch.Tensor:
    return output(model, attention_mask=padded("left"), use_cache=False)[padded("left").bool()]


def right(model: Any) -> torch.Tensor:
    return output(model, attention_mask=padded("right"), use_cache=False)[padded("right").bool()]


def packed(model: Any) -> torch.Tensor:
    positions = torch.cat([torch.arange(length) for length in (9, 1, 13)])[None]
    return output(model, TOKENS[:1], position_ids=positions, use_cache=False)


def in_chunks(model: Any, cache: Any, mask: torch.Tensor | None = None) -> torch.Tensor:
    """A prefill in three parts; with a mask, of real tokens only."""
    parts = []
    for start, stop in ((0, 11), (11, 14), (14, 23)):
        chunk = None if mask is None else mask[:, :stop]
        parts.append(output(model, TOKENS[:, start:stop], **{CACHE: cache}, attention_mask=chunk, use_cache=True))
    found = torch.cat(parts, dim=1)
    return found if mask is None else found[mask.bool()]


def with_past(model: Any) -> torch.Tensor:
    return in_chunks(model, DynamicCache(config=model.config))


def with_padded_past(model: Any) -> torch.Tensor:
    return in_chunks(model, DynamicCache(config=model.config), padded("left"))


def with_static_cache(model: Any) -> torch.Tensor:
    return in_chunks(model, StaticCache(config=model.config, max_cache_len=40))


DECODER_RUNS = (plain, left, right, packed, with_past, with_padded_past, with_static_cache)


def encoded(model: Any) -> torch.Tensor:
    return output(model)


def encoded_right(model: Any) -> torch.Tensor:
    return output(model, attention_mask=padded("right"))[padded("right").bool()]


def multimodal() -> Any:
    """A tiny Gemma 3 with its vision tower."""
    text = {**SIZES, "head_dim": 16, "sliding_window": 7}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    config = CONFIG_MAPPING["gemma3"](text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    return AutoModel.from_config(config).eval().requires_grad_(False)


def capture_attention(model: Any, tokens: torch.Tensor, *, names: Iterable[str] | None = None) -> dict[str, Any]:
    """Inputs of attention layers on `tokens`, (batch, length) ids, by name of the attention module, all held at once.

    names: only these modules, default all.
    """
    wanted = set(attention_modules(model) if names is None else names)
    found: dict[str, Any] = {}

    def visit(name: str, inputs: Any) -> None:
        if name in wanted:
            found[name] = inputs

    observe_attention(model, tokens, visit)
    return found
