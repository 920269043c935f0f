"""Tiny decoders of every family, with random weights: what tests of the cut are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "head_dim": 8,
    **SPECIAL,
}


def _plain(name: str, **changes: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**{**SHAPE, **changes})


def _gpt2(name: str = "GPT2Config", **changes: Any) -> Callable[[], Any]:
    shape = {"vocab_size": 96, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, **SPECIAL}
    return lambda: getattr(transformers, name)(**{**shape, **changes})


def _without(*missing: str, **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in SHAPE.items() if key not in missing} | changes


WINDOWS = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": _plain("LlamaConfig", tie_word_embeddings=True),
    "llama-untied": _plain("LlamaConfig", tie_word_embeddings=False),
    "gpt2": _gpt2(),
    "gpt2-inverse-index": _gpt2(scale_attn_by_inverse_layer_idx=True),
    "gpt-neo": lambda: transformers.GPTNeoConfig(
        vocab_size=96,
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=4,
        max_position_embeddings=64,
        **SPECIAL,
    ),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**_without("num_key_value_heads", "head_dim")),
    "opt": lambda: transformers.OPTConfig(
        **_without("num_key_value_heads", "head_dim", "intermediate_size", ffn_dim=64, word_embed_proj_dim=32)
    ),
    "opt-350m": lambda: transformers.OPTConfig(
        **_without(
            "num_key_value_heads",
            "head_dim",
            "intermediate_size",
            ffn_dim=64,
            word_embed_proj_dim=16,
            do_layer_norm_before=False,
        )
    ),
    "bloom": lambda: transformers.BloomConfig(vocab_size=96, hidden_size=32, n_layer=4, n_head=4, **SPECIAL),
    "phi": lambda: transformers.PhiConfig(**_without("head_dim")),
    "gemma": _plain("GemmaConfig"),
    "gemma2": _plain("Gemma2Config", layer_types=WINDOWS, sliding_window=4, query_pre_attn_scalar=8),
    "gemma3": _plain("Gemma3TextConfig", layer_types=WINDOWS, sliding_window=4, query_pre_attn_scalar=8),
    "mistral": _plain("MistralConfig", sliding_window=4),
    "qwen2": _plain("Qwen2Config", use_sliding_window=True, layer_types=WINDOWS, sliding_window=4),
    "qwen3": _plain("Qwen3Config"),
    "granite": _plain("GraniteConfig", embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5),
}


def decoder(family: str, seed: int = 0) -> PreTrainedModel:
    """Return a tiny decoder of a family; weights are spread wide enough for greedy choices to be clear."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    return model.requires_grad_(False)
