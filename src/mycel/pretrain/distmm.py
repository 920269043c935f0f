"""DistMM: a pipeline of two towers that meets once a batch, so that every pair is told from all others.

Huang et al. 2024, "DISTMM: Accelerating Distributed Multimodal Model Training" (catalogue number 54). A contrastive
loss needs all R pairs of a batch at once; ordinary micro-batches leave each pair only the M - 1 others of its own. With
a batch-sync, K = R / M forwards run, their features are joined into R rows, the loss runs forward and back once,
and the gradient of the features is split into K pieces for K backwards:

    for k:  f_k = towers(x_k)            (activations are kept)
    sync:   F = [f_1 .. f_K];   L = InfoNCE(F);   G = dL/dF
    for k:  backward of f_k with G_k

so gradients are those of the uncut batch. DISTMM-Pipe runs micro-batches of half the size and lets one group's
backwards fill the time that the next group's forwards would wait. The partitioner gives each tower devices of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mycel.decisions.timeline import Course, Task, simulate
from mycel.rounds.laboratory import Measured

if TYPE_CHECKING:
    from mycel.rounds.laboratory import Laboratory

COLOURS, SHAPES, SIDE = 6, 5, 12
Towers = tuple[nn.Module, nn.Module]
Pairs = tuple[Tensor, Tensor]
TEMPERATURE = 0.1
WAYS = ("forward", "backward")


def towers(seed: int = 0, width: int = 48) -> Towers:
    """An image tower over 12 x 12 pixels of three colours, and a text tower over captions of two words."""
    torch.manual_seed(seed)
    image = nn.Sequential(
        nn.Conv2d(3, 16, 4, stride=2),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(16 * 25, width),
        nn.GELU(),
        nn.Linear(width, width),
    )
    text = nn.Sequential(
        nn.Embedding(COLOURS + SHAPES, width),
        nn.Flatten(),
        nn.Linear(2 * width, width),
        nn.GELU(),
        nn.Linear(width, width),
    )
    return image, text


def pairs(count: int, seed: int) -> Pairs:
    """Draw pictures of coloured shapes at chance places, with noise, and their captions: (N, 3, 12, 12) and (N, 2)."""
    source = torch.Generator().manual_seed(seed)
    colour = torch.randint(COLOURS, (count,), generator=source)
    shape = torch.randint(SHAPES, (count,), generator=source)
    palette = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]], dtype=torch.float32)
    masks = torch.zeros(SHAPES, 5, 5)
    masks[0] = 1  # square
    masks[1, 2], masks[1, :, 2] = 1, 1  # cross
    masks[2] = torch.eye(5)
    masks[3, ::2] = 1  # bars lying
    masks[4, :, ::2] = 1  # bars standing
    images = 0.2 * torch.randn(count, 3, SIDE, SIDE, generator=source)
    for index in range(count):
        top, left = torch.randint(SIDE - 4, (2,), generator=source).tolist()
        images[index, :, top : top + 5, left : left + 5] += (
            palette[colour[index]][:, None, None] * masks[shape[index]][None]
        )
    return images, torch.stack([colour, COLOURS + shape], dim=1)


def contrast(images_ND: Tensor, texts_ND: Tensor, captions_N2: Tensor) -> Tensor:
    """InfoNCE both ways over all pairs; pairs of the same caption all count as right answers."""
    left, right = nn.functional.normalize(images_ND, dim=1), nn.functional.normalize(texts_ND, dim=1)
    logits = left @ right.T / TEMPERATURE
    same = (captions_N2[:, None] == captions_N2[None]).all(dim=2).to(logits.dtype)
    wanted = same / same.sum(dim=1, keepdim=True)
    both = nn.functional.cross_entropy(logits, wanted) + nn.functional.cross_entropy(logits.T, wanted)
    return both / 2


def synchronised(model: Towers, batch: Pairs, pieces: int) -> float:
    """Fill gradients through a batch-sync over ``pieces`` micro-batches; return the loss over the whole batch."""
    images, captions = batch
    made = [
        (model[0](image), model[1](caption))
        for image, caption in zip(images.chunk(pieces), captions.chunk(pieces), strict=True)
    ]
    gathered = [torch.cat([each[side].detach() for each in made]).requires_grad_() for side in (0, 1)]
    loss = contrast(gathered[0], gathered[1], captions)
    loss.backward()  # type: ignore[no-untyped-call]
    for side in (0, 1):
        gradient = gathered[side].grad
        assert gradient is not None
        for each, part in zip(made, gradient.chunk(pieces), strict=True):
            each[side].backward(part)
    return float(loss.detach())


def by_pieces(model: Towers, batch: Pairs, pieces: int) -> float:
    """Fill gradients as ordinary micro-batches do: each sees only its own pairs."""
    total = 0.0
    for image, caption in zip(batch[0].chunk(pieces), batch[1].chunk(pieces), strict=True):
        loss = contrast(model[0](image), model[1](caption), caption) / pieces
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total


Filling = Callable[[Towers, Pairs, int], float]


def gradient_of(fill: Filling, batch: Pairs, pieces: int) -> Tensor:
    """All gradients of fresh towers as one row, in double precision."""
    model = towers()
    for tower in model:
        tower.double()
    fill(model, (batch[0].double(), batch[1]), pieces)
    return torch.cat(
        [weight.grad.flatten() for tower in model for weight in tower.parameters() if weight.grad is not None]
    )


def accuracy(model: Towers, batch: Pairs) -> float:
    """Share of pictures whose nearest of all captions is their own."""
    captions = torch.tensor([[c, COLOURS + s] for c, s in product(range(COLOURS), range(SHAPES))])
    with torch.no_grad():
        texts = nn.functional.normalize(model[1](captions), dim=1)
        found = captions[(nn.functional.normalize(model[0](batch[0]), dim=1) @ texts.T).argmax(dim=1)]
    return float((found == batch[1]).all(dim=1).float().mean())


def learnt(fill: Filling, steps: int = 200, rows: int = 64, pieces: int = 32) -> float:
    """Train towers and return their accuracy on pictures not seen."""
    model, data = towers(), pairs(2048, 1)
    optimizer = torch.optim.AdamW([weight for tower in model for weight in tower.parameters()], lr=2e-3)
    source = torch.Generator().manual_seed(2)
    for _ in range(steps):
        chosen = torch.randint(len(data[0]), (rows,), generator=source)
        optimizer.zero_grad()
        fill(model, (data[0][chosen], data[1][chosen]), pieces)
        optimizer.step()
    return accuracy(model, pairs(512, 3))


@dataclass(frozen=True)
class Tower:
    """A submodule: its seconds for a row on one device, and the share of its work that more devices do not divide."""

    name: str
    seconds: float
    fixed: float = 0.0

    def on(self, devices: int) -> float:
        """Seconds for a row on so many devices."""
        return self.seconds * (self.fixed + (1 - self.fixed) / devices)


def share_out(parts: Sequence[Tower], devices: int) -> tuple[int, ...]:
    """Devices of each tower so that the slowest is fastest: greedy from one each, which is exact for falling times."""
    counts = [1] * len(parts)
    for _ in range(devices - len(parts)):
        slowest = max(range(len(parts)), key=lambda index: parts[index].on(counts[index]))
        counts[slowest] += 1
    return tuple(counts)


def synchronous_pipe(stages: int, pieces: int, groups: int, seconds: float, interleaved: bool) -> Course:
    """Simulate groups of micro-batches with a sync each; interleaved: halved, and the next group's forwards come early.

    ``seconds`` is a stage's forward of one micro-batch; a backward takes twice as long.
    """
    count, each = (2 * pieces, seconds / 2) if interleaved else (pieces, seconds)
    places = []
    for stage in range(stages):
        forwards, backwards = ([(way, *divmod(k, count)) for k in range(groups * count)] for way in WAYS)
        # What a stage computes ahead while gradients are on their way to it; two groups live at a time.
        ahead = min(count + 2 * (stages - 1 - stage), 2 * count) if interleaved else count
        order = forwards[:ahead]
        for k, backward in enumerate(backwards):
            order.append(backward)
            if interleaved:
                order += forwards[ahead + k : ahead + k + 1]
            elif (k + 1) % count == 0:
                order += forwards[k + 1 : k + 1 + count]
        places.append([_piece(stage, stages, count, each, *task) for task in order])
    return simulate(places)


def _piece(stage: int, stages: int, count: int, each: float, way: str, group: int, k: int) -> Task:
    if way == "forward":
        after = [(f"forward {stage - 1} {group} {k}", 0.0)] if stage else []
    elif stage < stages - 1:
        after = [(f"backward {stage + 1} {group} {k}", 0.0)]
    else:  # the sync: every feature of the group
        after = [(f"forward {stage} {group} {other}", 0.0) for other in range(count)]
    return Task(f"{way} {stage} {group} {k}", each * (1 if way == "forward" else 2), tuple(after))


def claim(lab: Laboratory) -> Measured:
    """Gradients of the uncut batch, which micro-batches miss; better retrieval; shorter bubbles; devices of its own."""
    batch = pairs(64, 4)
    whole = gradient_of(by_pieces, batch, 1)
    apart, naive = (
        float((gradient_of(fill, batch, 8) - whole).norm() / whole.norm()) for fill in (synchronised, by_pieces)
    )
    kept, lost = learnt(synchronised), learnt(by_pieces)
    plain, pipe = (synchronous_pipe(4, 4, 4, 1.0, each) for each in (False, True))
    parts = (Tower("image", 8.0, 0.02), Tower("text", 2.0, 0.3))
    counts = share_out(parts, 4)
    own = max(part.on(count) for part, count in zip(parts, counts, strict=True))
    together = math.fsum(part.on(4) for part in parts)
    return Measured(
        f"gradients lie {apart:.0e} from the uncut batch's, those of 8 micro-batches {naive:.0%}; {kept:.0%} of unseen "
        f"pictures find their caption, {lost:.0%} with micro-batches of 2; four groups take {pipe.seconds:.0f} instead "
        f"of {plain.seconds:.0f} (idle {pipe.idle:.0%} instead of {plain.idle:.0%}); towers on {counts} devices "
        f"{own:.2f} s a row, both over all {together:.2f} (simulated)",
        apart < 1e-5 and naive > 0.1 and kept > lost and pipe.seconds < plain.seconds and own < together,
        {
            "apart": apart,
            "naive": naive,
            "accuracy": kept,
            "accuracy_pieces": lost,
            "speed_up": plain.seconds / pipe.seconds,
        },
    )
