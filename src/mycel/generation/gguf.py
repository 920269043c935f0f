"""GGUF, the file that llama.cpp and its many friends read, for the Llama family with a byte-level tokeniser."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from mycel.errors import ExtraMissing, ModelError

KINDS = ("f32", "f16", "bf16", "q8_0")
FAMILIES = ("llama", "mistral")
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
BLOCK_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
CONTROL, NORMAL = 3, 1  # llama.cpp's kinds of tokens


def write_gguf(folder: Path, file: Path, kind: str = "f32") -> None:
    """Write a model in Hugging Face's format as one GGUF file.

    Parameters
    ----------
    folder : Path
        The model and its tokeniser.
    file : Path
        Written whole or not at all.
    kind : str
        How matrices are kept: f32, f16, bf16 or q8_0.

    Raises
    ------
    ModelError
        When the family or the tokeniser has no form in GGUF that is built here.
    ExtraMissing
        When the gguf library is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ExtraMissing("gguf", "gguf")
    import gguf

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type not in FAMILIES:
        raise ModelError(f"the family {config.model_type!r} is not written as GGUF here: use one of {FAMILIES}")
    if kind not in KINDS:
        raise ModelError(f"the quantization is {kind!r}: GGUF is written as {', '.join(KINDS)}")
    partial = file.with_name(f"{file.name}.partial")
    writer = gguf.GGUFWriter(partial, "llama")
    try:
        _shape(writer, config, folder)
        _tokenizer(writer, folder, config)
        for name, tensor in _tensors(folder):
            _add(writer, gguf, config, name, tensor, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    partial.rename(file)


def _shape(writer: Any, config: Any, folder: Path) -> None:
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(folder.name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_rope_freq_base(float(rope.get("rope_theta", getattr(config, "rope_theta", 10000.0))))
    if rope.get("rope_type", "default") != "default":
        raise ModelError(f"the rotary embedding {rope['rope_type']!r} is not written as GGUF here")


def _tokenizer(writer: Any, folder: Path, config: Any) -> None:
    try:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        model = content["model"]
        if model["type"] != "BPE" or content["decoder"]["type"] != "ByteLevel":
            raise KeyError(model["type"])
        words: dict[str, int] = dict(model["vocab"])
        added = {entry["content"]: entry["id"] for entry in content.get("added_tokens", [])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"the tokeniser in {folder} is no byte-level BPE, which alone is written as GGUF") from error
    words.update(added)
    names = {index: word for word, index in words.items()}
    # Rows of the embedding that no token has are given names that no text contains.
    tokens = [names.get(index, f"[UNUSED_{index}]") for index in range(config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if token in added else NORMAL for token in tokens])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]])
    for add, name in (
        (writer.add_bos_token_id, "bos"),
        (writer.add_eos_token_id, "eos"),
        (writer.add_pad_token_id, "pad"),
    ):
        token = getattr(config, f"{name}_token_id", None)
        if isinstance(token, int):
            add(token)
    writer.add_add_bos_token(False)


def _tensors(folder: Path) -> list[tuple[str, Tensor]]:
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return sorted(found.items())


def _add(writer: Any, gguf: Any, config: Any, name: str, tensor: Tensor, kind: str) -> None:
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return
    target = NAMES.get(name)
    if target is None:
        parts = name.split(".", 3)
        leaf = BLOCK_NAMES.get(parts[3]) if len(parts) == 4 and parts[:2] == ["model", "layers"] else None
        if leaf is None:
            raise ModelError(
                f"the weight {name[:120]!r} has no place in GGUF's llama: this variant is not written here"
            )
        target = f"blk.{parts[2]}.{leaf}"
        if leaf in ("attn_q.weight", "attn_k.weight"):
            heads = config.num_attention_heads if leaf == "attn_q.weight" else config.num_key_value_heads
            tensor = _interleaved(tensor, heads)
    values = tensor.to(torch.float32).numpy()
    if tensor.ndim == 1 or kind == "f32":
        writer.add_tensor(target, values)
    elif kind == "f16":
        writer.add_tensor(target, values.astype("float16"))
    else:
        packing = gguf.GGMLQuantizationType[kind.upper()]
        writer.add_tensor(target, gguf.quants.quantize(values, packing), raw_dtype=packing)


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Order a head's rows as llama.cpp rotates them: neighbours, where transformers rotates halves."""
    rows, columns = weight.shape
    halves = weight.view(heads, 2, rows // heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns).contiguous()
