"""The laws that every pace obeys, ours or a stranger's."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

from mycel.rounds.pace import Pace, View, parse_pace
from mycel.testing.laws import law

NODES = 7
MOMENTS = 400  # asks, arrivals, losses and rounds of one imagined federation


def check_pace(pace: Pace | str) -> None:
    """Hold a pace to its contract; raise ``AssertionError`` with the law it breaks.

    The pace drives imagined federations in which answers arrive, are refused, or never come, in any order.

    Parameters
    ----------
    pace : Pace or str
        The pace, or the text that ``parse_pace`` makes one of.
    """
    if isinstance(pace, str):
        pace = parse_pace(pace)
    for cohort in (NODES, 3, 1):
        for trouble in (0.0, 0.3):
            for seed in range(5):
                _imagine(pace, random.Random(f"{cohort}/{trouble}/{seed}"), cohort, trouble)


def _imagine(pace: Pace, chance: random.Random, size: int, trouble: float) -> None:
    view = View(0, _cohort(chance, size))
    rounds = stalled = 0
    for _ in range(MOMENTS):
        asked = _ask(pace, view)
        view = replace(view, outstanding=(*view.outstanding, *asked), overdue=False)
        if not view.outstanding:
            stuck = not view.arrived and set(view.refused) >= set(view.cohort)
            law(stuck, f"{pace.name}: with nobody out and somebody left to ask, it asks or has combined: {view}")
            stalled += 1
            view = View(view.version + 1, _cohort(chance, size))
            continue
        view = _happen(view, chance, trouble)
        if _ready(pace, view):
            rounds += 1
            kept = view.outstanding if pace.keeps else ()
            view = View(view.version + 1, _cohort(chance, size), kept)
    law(rounds > 0, f"{pace.name}: rounds come to an end")
    law(trouble or not stalled, f"{pace.name}: without trouble nothing stalls")


def _cohort(chance: random.Random, size: int) -> tuple[int, ...]:
    return tuple(sorted(chance.sample(range(NODES), size)))


def _happen(view: View, chance: random.Random, trouble: float) -> View:
    """Let one node that is out answer soundly, be refused, or be given up; or let only time pass."""
    node = chance.choice(view.outstanding)
    rest = tuple(other for other in view.outstanding if other != node)
    luck = chance.random()
    if luck < trouble / 3:
        return replace(view, outstanding=rest, refused=(*view.refused, node))
    if luck < 2 * trouble / 3:
        return replace(view, outstanding=rest)
    if luck < trouble:
        return replace(view, overdue=True)
    return replace(view, outstanding=rest, arrived=(*view.arrived, node))


def _ask(pace: Pace, view: View) -> list[int]:
    before = copy.deepcopy(pace)
    asked = list(pace.ask(view))
    law(list(pace.ask(view)) == asked and pace == before, f"{pace.name}: ask() is pure: the same view, the same nodes")
    law(len(set(asked)) == len(asked), f"{pace.name}: nobody is asked twice at once")
    law(set(asked) <= set(view.cohort), f"{pace.name}: only the cohort is asked")
    busy = {*view.outstanding, *view.arrived, *view.refused}
    law(not busy & set(asked), f"{pace.name}: who is out, has answered or was refused is not asked")
    return asked


def _ready(pace: Pace, view: View) -> bool:
    ready = pace.ready(view)
    law(pace.ready(view) == ready, f"{pace.name}: ready() is pure: the same view, the same verdict")
    law(view.arrived or not ready, f"{pace.name}: nothing is combined when nothing has arrived")
    everyone = {*view.arrived, *view.refused} >= set(view.cohort) and not view.outstanding
    law(ready or not (everyone and view.arrived), f"{pace.name}: all who can answer have, so it is ready")
    return ready
