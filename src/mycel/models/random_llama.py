"""Llama models of any shape with random weights, for measuring what does not depend on their values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig


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
    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, hidden // 64),
        "num_key_value_heads": max(1, hidden // 64),
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**settings, **changes}))
    model.save_pretrained(folder)
    return folder
