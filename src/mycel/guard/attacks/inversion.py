"""Reading text back out of gradients and out of activations that cross a cut.

The gradient of a linear layer is a sum of outer products with its inputs, so inputs lie in its row space: of a first
layer's gradient, every token whose embedding lies there was in the text (DAGER: Petrov et al. 2024). LoRA narrows the
space to ``rank`` directions: A's own gradient has as many rows.

Activations at a cut are inverted by a linear map fitted on public text, and the nearest embedding (Song and
Raghunathan 2020).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

TOLERANCE = 1e-3  # relative energy that may lie outside of the span


def span_tokens(gradient: Tensor, candidates: Tensor) -> Tensor:
    """Return the tokens whose input vectors lie in the row space of a gradient.

    Parameters
    ----------
    gradient : Tensor
        (outputs, inputs) of a linear layer, or of a factor A (rank, inputs).
    candidates : Tensor
        (tokens, inputs): what the layer's input would be for each token.
    """
    _, values, rows = torch.linalg.svd(gradient.double(), full_matrices=False)
    basis = rows[values > 1e-6 * values.max().clamp_min(1e-30)]
    if len(basis) == gradient.shape[1]:  # everything lies in the whole space: nothing is told
        return torch.empty(0, dtype=torch.int64)
    wanted = candidates.double()
    inside = (wanted @ basis.T).square().sum(1)
    whole = wanted.square().sum(1).clamp_min(1e-30)
    return torch.nonzero(1 - inside / whole < TOLERANCE).flatten()


def fit_inverse(hidden: Tensor, embeddings: Tensor, ridge: float = 1e-2) -> Tensor:
    """Return the map (hidden, embedding) that best predicts embeddings from public activations (N, hidden)."""
    lifted = torch.cat([hidden, torch.ones(len(hidden), 1)], 1).double()
    square = lifted.T @ lifted
    scale = ridge * square.diagonal().mean()
    found: Tensor = torch.linalg.solve(
        square + scale * torch.eye(len(square), dtype=torch.float64), lifted.T @ embeddings.double()
    )
    return found


def _bare(hidden: Tensor) -> Tensor:
    return hidden


@torch.no_grad()
def read_cut(
    model: PreTrainedModel, depth: int, public: Tensor, secret: Tensor, veil: Callable[[Tensor], Tensor] = _bare
) -> float:
    """Share of a secret text's tokens that are read back from what crosses a cut after ``depth`` blocks.

    Parameters
    ----------
    depth : int
        0: the cut lies behind the embedding.
    public, secret : Tensor
        Token ids (B, T); the attacker runs the model's first part on the public ones itself.
    veil : callable
        What becomes of activations (N, hidden) before they cross; the attacker knows it, and treats its own alike.
    """
    table = model.get_input_embeddings().weight

    def cross(ids: Tensor) -> Tensor:
        hidden: Tensor = model(input_ids=ids, output_hidden_states=True).hidden_states[depth]
        return veil(hidden.reshape(-1, hidden.shape[-1]))

    inverse = fit_inverse(cross(public), table[public.reshape(-1)])
    return float((invert(cross(secret), inverse, table) == secret.reshape(-1)).double().mean())


def invert(hidden: Tensor, inverse: Tensor, table: Tensor) -> Tensor:
    """Return the nearest tokens by cosine, (N), for activations (N, hidden) and an embedding table."""
    lifted = torch.cat([hidden, torch.ones(len(hidden), 1)], 1).double()
    guess = torch.nn.functional.normalize(lifted @ inverse, dim=1)
    return (guess @ torch.nn.functional.normalize(table.double(), dim=1).T).argmax(1)
