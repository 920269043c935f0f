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
from transformers import PreTrainedModel

from mycel.collectives.attention import Spanning, over_tokens
from mycel.collectives.balanced_attention import Stash
from mycel.collectives.keeping import Spill, Through, left_behind, passed
from mycel.collectives.ranks import Ranks
from mycel.decisions.keeping import AGAIN, DIVIDED, MIB, WAYS, Knapsack, peak, room_of, ways_of
from mycel.decisions.layout import check_family, stage_blocks, stages_of

COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
WHOLE = {"embedding": "model.embed_tokens", "blocks": "model.layers", "norm": "model.norm", "head": "lm_head"}
ROWS = ("self_attn.o_proj", "mlp.down_proj")


class Chunk(nn.Module):
    """Consecutive blocks of a decoder, with the embedding before the first and the head after the last.

    Parameters
    ----------
    model : PreTrainedModel
        Whose parts are used, not copied.
    ranks : Ranks
        Decides where this rank's tokens begin.
    place : int
        Which of the pipeline's stages this is.
    spill : Spill
        Where activations go that are sent away.

    Attributes
    ----------
    keeping : list of str
        What each block of the model leaves for its way back.
    """

    def __init__(self, model: PreTrainedModel, ranks: Ranks, place: int, spill: Spill) -> None:
        super().__init__()
        layout, inner = ranks.layout, model.model
        stages = layout.pipeline * layout.chunks
        held = stage_blocks(len(inner.layers), stages, list(layout.blocks) or None)[place]
        self.place, self.first, self.last = place, place == 0, place == stages - 1
        if self.first:
            self.embedding = inner.embed_tokens
        self.blocks = nn.ModuleDict({str(index): inner.layers[index] for index in held})
        if self.last:
            self.norm, self.head = inner.norm, model.lm_head
        self.rotary = inner.rotary_emb
        self.keeping = ways_of(layout, len(inner.layers))
        self.spill = spill
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
        for index, block in self.blocks.items():
            how = self.keeping[int(index)] if self.training else "keep"
            hidden = passed(self._over_tokens(block, positions, how in AGAIN), hidden, how, self.spill)
        if self.last:
            hidden = self.head(self.norm(hidden))
        return hidden

    def _over_tokens(self, block: nn.Module, positions: Any, again: bool) -> Through:
        """One block's pass; a way back that computes it again tells the attention anew where its tokens are."""
        model, ranks, compute = self._model[0], self._ranks[0], through(block, positions)
        stash = Stash() if again else None
        spanning = Spanning(ranks.group("sequence"), ranks.layout.attention == "balanced", stash)

        def over(entering: Tensor) -> Tensor:
            with over_tokens(model, spanning):
                hidden = compute(entering)
            if stash is not None:
                stash.again = True
            return hidden

        return over


def through(block: nn.Module, positions: Any) -> Through:
    """Return the pass of a block alone, from hidden states to hidden states."""

    def compute(entering: Tensor) -> Tensor:
        left = block(entering, attention_mask=None, position_embeddings=positions)
        hidden: Tensor = left[0] if isinstance(left, tuple) else left
        return hidden

    return compute


class Stage(nn.Module):
    """A rank's part of a decoder: one chunk of it, or several where a schedule loops.

    Attributes
    ----------
    first, last : bool
        Whether the embedding or the head is here; both on one rank where the pipeline turns back.
    """

    def __init__(self, model: PreTrainedModel, ranks: Ranks) -> None:
        super().__init__()
        check_family(model.config)
        places = stages_of(ranks.layout, ranks.place("pipeline"))
        self.spill = Spill()
        self.chunks = nn.ModuleList(Chunk(model, ranks, place, self.spill) for place in places)
        self.first, self.last = places[0] == 0, places[-1] == ranks.layout.pipeline * ranks.layout.chunks - 1
        self.tied = bool(model.config.tie_word_embeddings)
        self.width = int(model.config.hidden_size)

    def held(self) -> list[Chunk]:
        """The chunks, in the order of the model."""
        return [chunk for chunk in self.chunks if isinstance(chunk, Chunk)]

    @property
    def shared(self) -> set[nn.Parameter]:
        """The tied weight where two chunks of this rank use it, so that neither can shard it alone."""
        apart = len(self.chunks) > 1 and self.first and self.last
        return {self.held()[0].embedding.weight} if apart and self.tied else set()


def lay_out(model: PreTrainedModel, ranks: Ranks, piece: tuple[int, int] = (1, 1)) -> Stage:
    """Divide a model over an island and return this rank's stage; the model must be the same on every rank.

    Parameters
    ----------
    piece : tuple of int
        Rows and tokens that pass through a stage at once, for a layout that limits what they leave.
    """
    stage = Stage(model.to(ranks.device), ranks).train()
    stage.requires_grad_(True)
    layout = ranks.layout
    if layout.activation_mib:
        fit(stage, ranks, piece, layout.activation_mib * MIB)
    for chunk in stage.held():
        if layout.tensor > 1:
            plan: dict[str, ParallelStyle] = dict.fromkeys(COLUMNS, ColwiseParallel())
            plan |= dict.fromkeys(ROWS, RowwiseParallel())
            for block in chunk.blocks.values():
                parallelize_module(block, ranks.mesh["tensor"], plan)
        if _sharded(ranks):
            for block in chunk.blocks.values():
                # Torch's divided way back looks for the weights among those registered when it begins: they have to be
                # the whole ones still, or it passes them by.
                fully_shard(block, mesh=ranks.replicas, reshard_after_forward=layout.schedule not in DIVIDED)
            fully_shard(chunk, mesh=ranks.replicas, ignored_params=stage.shared)
    return stage


def fit(stage: Stage, ranks: Ranks, piece: tuple[int, int], limit: float) -> float:
    """Choose what this rank's blocks leave within ``limit`` bytes, and return the bytes that they then take.

    Each way is tried on a block of a stage that is not divided yet.
    """
    rows, tokens = piece
    chunk = stage.held()[0]
    hidden = torch.zeros(rows, tokens, stage.width, device=ranks.device, dtype=next(stage.parameters()).dtype)
    positions = chunk.rotary(hidden, torch.arange(tokens, device=ranks.device)[None])
    block = next(iter(chunk.blocks.values()))
    left = {how: left_behind(through(block, positions), hidden, how, stage.spill) for how in WAYS}
    flops = 2.0 * sum(weight.numel() for weight in block.parameters()) * rows * tokens
    held = sorted(int(index) for each in stage.held() for index in each.blocks)
    leaves = hidden.numel() * hidden.element_size()
    room = room_of(left, leaves, flops, len(held), ranks.layout, limit)
    chosen = Knapsack().decide(room)
    for index, way in zip(held, chosen, strict=True):
        for each in stage.held():
            each.keeping[index] = room.blocks[0][way].name
    return peak(room, chosen)


def _sharded(ranks: Ranks) -> bool:
    return ranks.layout.data * ranks.layout.sequence > 1 and not ranks.layout.codec


def named_weights(stage: Stage) -> dict[str, nn.Parameter]:
    """This rank's parameters by the names of the whole model; a tied head goes by the embedding's name."""
    named = {}
    for path, parameter in stage.named_parameters():
        name = path.split(".", 2)[2]
        part, _, rest = name.partition(".")
        if part == "head" and stage.tied:
            named["model.embed_tokens.weight"] = parameter
        else:
            named[f"{WHOLE[part]}.{rest}"] = parameter
    return named


def settle(stage: Stage, ranks: Ranks) -> None:
    """After the way back: add up a tied embedding's gradients from the first and the last stage."""
    if _sharded(ranks):
        for each in stage.shared:
            dist.all_reduce(each.grad, op=dist.ReduceOp.AVG, group=ranks.replicas.get_group())
    if not stage.tied or ranks.layout.pipeline == 1 or ranks.layout.schedule == "zbv":
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
