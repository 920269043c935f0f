"""Small random bases of several families, saved to a folder and opened as any other base is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from mycel.models.base import Base, open_base, save_model
from mycel.models.vocabulary import train_tokenizer

FAMILIES = ("llama", "gpt2", "opt", "gpt-neox", "t5")
ROWS = 320  # of the embedding: the tokeniser's bytes and special tokens, and a little more
HIDDEN = 32


def random_base(folder: Path, family: str = "llama", seed: int = 0) -> Base:
    """Save a random model of two blocks with a byte-level tokeniser, and open it from there.

    Parameters
    ----------
    folder : Path
        Where to save; made when missing.
    family : str
        One of ``FAMILIES``.
    seed : int
        Seed of the weights.
    """
    tokenizer = train_tokenizer([])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(family).eval()
        # Biases and norms start at constants, which would hide a wrong weight put in their place.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_model(Base(model, tokenizer, Path(), family), folder)
    return open_base(folder)


def _model(family: str) -> PreTrainedModel:
    common: dict[str, Any] = {"vocab_size": ROWS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    wide: dict[str, Any] = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64, **common))
    if family == "opt":
        shape = {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN, "max_position_embeddings": 64}
        return OPTForCausalLM(OPTConfig(**wide, **shape, **common))
    if family == "gpt-neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**wide, intermediate_size=48, max_position_embeddings=64, **common))
    if family == "t5":
        shape = {"d_model": HIDDEN, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
        return T5ForConditionalGeneration(T5Config(**shape, **common))
    shape = {"intermediate_size": 48, "max_position_embeddings": 64, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**wide, **shape, **common))
