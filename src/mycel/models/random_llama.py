"""Llama models of any shape with random weights, for measuring what does not depend on their values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig


def llama_config(hidden: int, layers: int, vocabulary: int, inner: int, heads: int = 4, **changes: Any) -> LlamaConfig:
    """Return a small Llama's configuration: a key-value head a head, weights not tied unless ``changes`` say."""
    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**settings, **changes})


def write_llama(folder: Path, hidden: int, layers: int, vocabulary: int = 2048, seed: int = 0, **changes: Any) -> Path:
    """Write a Llama with random weights in Hugging Face's format, and return its folder.

    Parameters
    ----------
    folder : Path
        Made when missing.
    hidden, layers, vocabulary : int
        Shape; heads have 64 numbers, the feed-forward part is 2.75 times as wide.
    seed : int
        Of the weights.
    changes : dict
        Further settings of the configuration.
    """
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    usual = {"max_position_embeddings": 2048, "tie_word_embeddings": True, **tokens}
    config = llama_config(hidden, layers, vocabulary, hidden * 11 // 4, max(1, hidden // 64), **{**usual, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return folder
