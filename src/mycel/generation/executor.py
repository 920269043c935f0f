"""Who computes: a batch of pieces of sequences in, logits out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from mycel.errors import ModelError
from mycel.generation.attention import NAME, Paged, Span, register
from mycel.generation.memory import Memory, Shape
from mycel.models.linear import Routing, quicken


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one sequence, to be computed now.

    Attributes
    ----------
    sequence : int
        Identity; an executor without pages keeps its own state under it.
    tokens : tuple of int
        At positions ``start`` and on; all earlier positions were computed before. A start that lies before the end of
        what was computed takes back what followed it.
    start : int
        Position of the first token.
    table : tuple of int
        Pages of positions 0 to the last token's; empty for an executor without pages.
    adapter : str
        Name of the adapter; empty: the base.
    wanted : int
        Number of last tokens whose logits are wanted; 0 while a prompt is not yet complete.
    """

    sequence: int
    tokens: tuple[int, ...]
    start: int
    table: tuple[int, ...] = ()
    adapter: str = ""
    wanted: int = 1


class Executor(Protocol):
    """Computes pieces of sequences, wherever the weights are.

    Attributes
    ----------
    vocabulary, context : int
        Rows of logits; most positions of a sequence.
    memory : Memory or None
        Where this process keeps keys and values in pages; None: the executor keeps them by sequence, out of sight.
    position_bytes : int
        Bytes of keys and values of one position in all layers.
    """

    vocabulary: int
    context: int
    memory: Memory | None
    position_bytes: int

    def reserve(self, pages: int, size: int) -> None:
        """Make room for this many pages of ``size`` positions."""

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Return logits of shape (sum of ``wanted``, vocabulary), pieces in the given order."""

    def forget(self, sequence: int) -> None:
        """Drop what is kept for a sequence."""

    def close(self) -> None:
        """Let go of whatever is held."""


class Whole:
    """The whole model in this process, its blocks untouched, over a paged key-value store.

    Families whose attention goes through transformers' interface compute all sequences of a batch in one row. The
    others (Bloom, GPT-Neo, Falcon, MPT) are given a cache over the same pages, one sequence after another.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder in evaluation mode; from here on it computes for this executor alone.
    pack : bool
        Whether a second copy of the weights is laid out for batches.
    release : callable, optional
        Called when the executor is closed.
    """

    def __init__(self, model: PreTrainedModel, pack: bool = True, release: Callable[[], None] = lambda: None) -> None:
        config = model.config
        if config.is_encoder_decoder:
            raise ModelError(f"{config.model_type!r} is an encoder-decoder: only decoders are served")
        self.model, self.release = model, release
        self.vocabulary = int(model.get_output_embeddings().weight.shape[0])
        self.context = int(getattr(config, "max_position_embeddings", 0) or getattr(config, "seq_length", 0) or 2048)
        self.memory: Memory | None = None
        self.together = bool(getattr(model, "_supports_attention_backend", False))
        self.shapes = self._shapes()
        self.position_bytes = sum(shape.bytes for shape in self.shapes)
        if self.together:
            register()
            model.set_attn_implementation(NAME)
        self.routing: Routing = quicken(model, pack)

    def reserve(self, pages: int, size: int) -> None:
        """Make room for this many pages of ``size`` positions."""
        self.memory = Memory(self.shapes, pages, size)

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Return logits of shape (sum of ``wanted``, vocabulary), pieces in the given order."""
        assert self.memory is not None
        with torch.inference_mode():
            if self.together:
                return self._together(pieces, self.memory)
            return torch.cat([self._alone(piece, self.memory) for piece in pieces])

    def forget(self, sequence: int) -> None:
        """Pages are the caller's: there is nothing to drop."""

    def close(self) -> None:
        """Let the pages go."""
        self.memory = None
        self.release()

    def _together(self, pieces: Sequence[Piece], memory: Memory) -> Tensor:
        order = sorted(range(len(pieces)), key=lambda index: pieces[index].adapter)
        placed = [pieces[index] for index in order]
        spans, runs, slots, rows = [], [], list[int](), dict[int, range]()
        at = 0
        for index, piece in zip(order, placed, strict=True):
            new = len(piece.tokens)
            length = piece.start + new
            spans.append(Span(at, at + new, length, memory.where(piece.table, length)))
            slots += memory.slots(piece.table, piece.start, length)
            if piece.adapter:
                runs.append((piece.adapter, at, at + new))
            rows[index] = range(at + new - piece.wanted, at + new)
            at += new
        self.routing.runs = _joined(runs)
        paged = Paged(memory, torch.tensor(slots), spans)
        output = self.model.base_model(
            input_ids=torch.tensor([[token for piece in placed for token in piece.tokens]]),
            position_ids=torch.tensor([[p for s in spans for p in range(s.length - s.end + s.start, s.length)]]),
            # Already four-dimensional, so that no mask is built; the attention function does not look at it.
            attention_mask=ANY_MASK,
            use_cache=False,
            paged=paged,
        )
        wanted = [row for index in range(len(pieces)) for row in rows[index]]
        return self._head(output.last_hidden_state[0], wanted)

    def _alone(self, piece: Piece, memory: Memory) -> Tensor:
        new = len(piece.tokens)
        self.routing.runs = [(piece.adapter, 0, new)] if piece.adapter else []
        length = piece.start + new
        slots = torch.tensor(memory.slots(piece.table, piece.start, length))
        span = Span(0, new, length, memory.where(piece.table, length))
        layers = [_PagedLayer(memory, index, slots, span) for index in range(len(self.shapes))]
        output = self.model.base_model(
            input_ids=torch.tensor([piece.tokens]), past_key_values=Cache(layers=layers), use_cache=True
        )
        return self._head(output.last_hidden_state[0], list(range(new - piece.wanted, new)))

    def _head(self, hidden: Tensor, rows: list[int]) -> Tensor:
        if not rows:
            return torch.empty(0, self.vocabulary)
        self.routing.runs = []
        chosen = hidden if rows == list(range(len(hidden))) else hidden[rows]
        logits: Tensor = self.model.get_output_embeddings()(chosen)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        scale = getattr(self.model.config, "logit_scale", None)
        if scale is not None:
            raise ModelError(f"{self.model.config.model_type!r} scales its logits, which is not built here")
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _shapes(self) -> list[Shape]:
        """Ask the model itself, with one token: families name and share their heads in many ways."""
        with torch.inference_mode():
            cache = self.model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=True).past_key_values
        return [Shape(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in cache.layers]


class _PagedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's cache for families that know only transformers' cache: the same pages behind its interface."""

    is_sliding = False

    def __init__(self, memory: Memory, layer: int, slots: Tensor, span: Span) -> None:
        super().__init__()
        self.memory, self.layer, self.slots, self.span = memory, layer, slots, span

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the pages are there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new positions, of shape (1, heads, new, width), and return all."""
        self.memory.write(self.layer, self.slots, key_states[0].transpose(0, 1), value_states[0].transpose(0, 1))
        keys, values = self.memory.read(self.layer, self.span.where, self.span.length)
        return keys.transpose(0, 1)[None], values.transpose(0, 1)[None]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many positions are seen, and where they begin."""
        return self.span.length, 0

    def get_seq_length(self) -> int:
        """Return how many positions were there before."""
        return self.span.length - self.span.end + self.span.start

    def get_max_length(self) -> int:
        """Return that pages set no limit."""
        return -1


ANY_MASK = torch.zeros(1, 1, 1, 1)


def _joined(runs: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    joined: list[tuple[str, int, int]] = []
    for name, start, end in runs:
        if joined and joined[-1][0] == name and joined[-1][2] == start:
            joined[-1] = (name, joined[-1][1], end)
        else:
            joined.append((name, start, end))
    return joined
