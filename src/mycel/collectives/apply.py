"""A layout laid over an untouched ``transformers`` decoder, from outside: the model's files know nothing of it.

Each rank keeps the blocks of its pipeline stage; matrices are divided over the tensor ranks (DTensor plans), what is
left is sharded over the replicas (FSDP2), and the sequence ranks' attention spans their tokens. Tied embeddings stand
in the first and the last stage; their gradients are added up after each step's way back.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mycel.collectives.attention import over_tokens
from mycel.collectives.layout import stage_blocks
from mycel.collectives.ranks import Ranks
from mycel.errors import ModelError

COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
WHOLE = {"embedding": "model.embed_tokens", "blocks": "model.layers", "norm": "model.norm", "head": "lm_head"}
ROWS = ("self_attn.o_proj", "mlp.down_proj")


class Stage(nn.Module):
    """Consecutive blocks of a decoder, with the embedding before the first and the head after the last.

    Parameters
    ----------
    model : PreTrainedModel
        Whose parts are used, not copied.
    ranks : Ranks
        Decides which blocks, and where this rank's tokens begin.
    """

    def __init__(self, model: PreTrainedModel, ranks: Ranks) -> None:
        super().__init__()
        layout, inner = ranks.layout, model.model
        if not hasattr(inner, "layers") or not hasattr(inner, "rotary_emb"):
            raise ModelError(
                f"{type(model).__name__} is no decoder with rotary positions: layouts are laid over the Llama family"
            )
        place = ranks.place("pipeline")
        held = stage_blocks(len(inner.layers), layout.pipeline, list(layout.blocks) or None)[place]
        self.first, self.last = place == 0, place == layout.pipeline - 1
        self.tied = bool(model.config.tie_word_embeddings)
        if self.first:
            self.embedding = inner.embed_tokens
        self.blocks = nn.ModuleDict({str(index): inner.layers[index] for index in held})
        if self.last:
            self.norm, self.head = inner.norm, model.lm_head
        self.rotary = inner.rotary_emb
        self.recompute = layout.recompute
        self.width = int(model.config.hidden_size)
        self._model = [model]  # in a list, so that its other parts are no part of this module
        self._ranks = [ranks]

    def forward(self, hidden: Tensor) -> Tensor:
        """Token ids (B, T) into hidden states (B, T, D) in the first stage; hidden states into logits in the last."""
        length = hidden.shape[1]
        start = self._ranks[0].place("sequence") * length
        place = torch.arange(start, start + length, device=hidden.device)[None]
        if self.first:
            hidden = self.embedding(hidden)
        positions = self.rotary(hidden, place)
        with over_tokens(self._model[0], self._ranks[0].group("sequence")):
            for block in self.blocks.values():
                hidden = self._through(block, hidden, positions)
        if self.last:
            hidden = self.head(self.norm(hidden))
        return hidden

    def _through(self, block: nn.Module, hidden: Tensor, positions: Any) -> Tensor:
        def compute(entering: Tensor) -> Tensor:
            left = block(entering, attention_mask=None, position_embeddings=positions)
            hidden: Tensor = left[0] if isinstance(left, tuple) else left
            return hidden

        if not (self.recompute and self.training):
            return compute(hidden)
        model, group = self._model[0], self._ranks[0].group("sequence")

        def again(entering: Tensor) -> Tensor:
            # The way back leaves forward's block, so the attention must be told again where its tokens are.
            with over_tokens(model, group):
                return compute(entering)

        kept: Tensor = checkpoint(again, hidden, use_reentrant=False)
        return kept


def lay_out(model: PreTrainedModel, ranks: Ranks) -> Stage:
    """Divide a model over an island and return this rank's stage; the model must be the same on every rank."""
    stage = Stage(model.to(ranks.device), ranks).train()
    stage.requires_grad_(True)
    layout = ranks.layout
    if layout.tensor > 1:
        plan: dict[str, ParallelStyle] = dict.fromkeys(COLUMNS, ColwiseParallel())
        plan |= dict.fromkeys(ROWS, RowwiseParallel())
        for block in stage.blocks.values():
            parallelize_module(block, ranks.mesh["tensor"], plan)
    if layout.data * layout.sequence > 1 and not layout.codec:
        for block in stage.blocks.values():
            fully_shard(block, mesh=ranks.replicas)
        fully_shard(stage, mesh=ranks.replicas)
    return stage


def named_weights(stage: Stage) -> dict[str, nn.Parameter]:
    """This rank's parameters by the names of the whole model; a tied head goes by the embedding's name."""
    named = {}
    for name, parameter in stage.named_parameters():
        part, _, rest = name.partition(".")
        if part == "head" and stage.tied:
            named["model.embed_tokens.weight"] = parameter
        else:
            named[f"{WHOLE[part]}.{rest}"] = parameter
    return named


def settle(stage: Stage, ranks: Ranks) -> None:
    """After the way back: add up a tied embedding's gradients from the first and the last stage."""
    if not stage.tied or ranks.layout.pipeline == 1:
        return
    weight = named_weights(stage).get("model.embed_tokens.weight")
    local = torch.zeros(()) if weight is None or weight.grad is None else _local(weight.grad)
    wanted = next(stage.parameters()).dtype
    # Every stage takes part in the sum, those between with zeros of the same shape.
    shape = [list(local.shape) if weight is not None else []]
    shapes: list[Any] = [None] * ranks.layout.pipeline
    dist.all_gather_object(shapes, shape[0], group=ranks.group("pipeline"))
    if weight is None:
        local = torch.zeros(shapes[0], device=ranks.device, dtype=wanted)
    dist.all_reduce(local, group=ranks.group("pipeline"))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a parameter or gradient as every rank together holds it; all of its ranks must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread(full: Tensor, like: Tensor) -> Tensor:
    """Inverse of ``whole``: this rank's part of ``full``, divided as ``like`` is; ``full`` is the same on each rank."""
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def gradient_norm(stage: Stage, ranks: Ranks) -> float:
    """Euclidean norm of the whole model's gradient; a tied weight counts once."""
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for name, parameter in named_weights(stage).items():
        twice = stage.tied and name == "model.embed_tokens.weight" and not stage.first
        if parameter.grad is not None and not twice:
            total += whole(torch.linalg.vector_norm(parameter.grad)).double() ** 2
    dist.all_reduce(total, group=ranks.group("pipeline"))
    return float(total.sqrt())
