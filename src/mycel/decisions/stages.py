"""What a rank of a pipeline holds and how long it waits, by its layout's schedule; what its blocks leave and repeat.

Of P ranks with v stages each, where M micro-batches take a rank t seconds each, a step takes M t of the slowest and, of
each other rank, the share of t that passes before the slowest begins or after it ends:

    gpipe, 1f1b, interleaved, breadth_first   1 / v            Narayanan et al. 2021; Lamy-Poirier 2023
    zero_bubble                               1 / (3 v)        Qi et al. 2024, with ways forward and back as long
    zbv                                       0                the same
"""

from __future__ import annotations

from collections.abc import Sequence

from mycel.decisions.keeping import CHEAP, ways_of
from mycel.decisions.layout import stage_blocks, stages_of
from mycel.recipe.schema import Layout

AGAIN = {"keep": 0.0, "selective": CHEAP, "recompute": 1.0, "offload": 0.0}  # share of a forward that is repeated


def waited(layout: Layout) -> float:
    """Share of each other rank's time for a micro-batch that a step waits."""
    if layout.schedule == "zbv":
        return 0.0
    return 1 / layout.chunks / (3 if layout.schedule == "zero_bubble" else 1)


def held(layout: Layout, split: Sequence[int], place: int) -> int:
    """Blocks of a rank, of all its stages; ``split`` are every stage's."""
    return sum(split[stage] for stage in stages_of(layout, place))


def ends(layout: Layout, place: int) -> tuple[bool, bool]:
    """Whether a rank holds the embedding, and whether it holds the head."""
    stages = stages_of(layout, place)
    return 0 in stages, layout.pipeline * layout.chunks - 1 in stages


def sides(layout: Layout, place: int) -> int:
    """How many times a micro-batch's states or their gradients leave a rank for another."""
    own, last = stages_of(layout, place), layout.pipeline * layout.chunks - 1
    forward = sum(stage < last and stage + 1 not in own for stage in own)
    return forward + sum(stage > 0 and stage - 1 not in own for stage in own)


def ways(layout: Layout, split: Sequence[int], place: int) -> list[str]:
    """What each block of a rank leaves for its way back."""
    named, parts = ways_of(layout, sum(split)), stage_blocks(sum(split), len(split), list(split))
    return [named[block] for stage in stages_of(layout, place) for block in parts[stage]]


def repeated(layout: Layout, split: Sequence[int], place: int) -> float:
    """Forward passes of a rank's blocks that its way back repeats, in blocks."""
    return sum(AGAIN[way] for way in ways(layout, split, place))
