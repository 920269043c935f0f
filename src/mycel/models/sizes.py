"""The built-in sizes: one knob from which the whole of a small base model follows.

All sizes share one tokeniser recipe (byte-level BPE, 2,048 entries), so that the logits of different sizes line up
and one can teach another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

VOCABULARY = 2048
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
CONTEXT = 1024


@dataclass(frozen=True)
class Size:
    """Shape and training budget of a built-in base.

    Attributes
    ----------
    name : str
        What a recipe calls it.
    family : {"llama", "t5"}
        Decoder-only, or encoder-decoder.
    hidden, layers, heads, intermediate : int
        Width, blocks (for T5: per stack), attention heads, width of the feed-forward part.
    steps : int
        Optimiser steps.
    learning_rate : float
        Peak of the cosine schedule.
    batch_size, window : int
        Sequences per step, tokens per sequence. Few tokens are seen in all, so many small steps learn the most of them.
    """

    name: str
    family: Literal["llama", "t5"]
    hidden: int
    layers: int
    heads: int
    intermediate: int
    steps: int
    learning_rate: float
    batch_size: int = 4
    window: int = 128

    def config(self) -> Any:
        """Return the ``transformers`` configuration of this size."""
        from transformers import LlamaConfig, T5Config

        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        if self.family == "t5":
            return T5Config(
                vocab_size=VOCABULARY,
                d_model=self.hidden,
                d_kv=self.hidden // self.heads,
                d_ff=self.intermediate,
                num_layers=self.layers,
                num_decoder_layers=self.layers,
                num_heads=self.heads,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
                decoder_start_token_id=0,
                **special,
            )
        return LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            **special,
        )


SIZES: dict[str, Size] = {
    size.name: size
    for size in (
        Size("micro", "llama", hidden=64, layers=2, heads=4, intermediate=172, steps=480, learning_rate=6e-3),
        Size("tiny", "llama", hidden=128, layers=4, heads=4, intermediate=344, steps=1100, learning_rate=4e-3),
        Size("small", "llama", hidden=192, layers=5, heads=6, intermediate=512, steps=800, learning_rate=3e-3),
        Size("tiny-t5", "t5", hidden=96, layers=2, heads=4, intermediate=256, steps=1000, learning_rate=4e-3),
    )
}
