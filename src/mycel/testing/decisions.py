"""The laws that every decision obeys, ours or a stranger's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from mycel.decisions.contract import Decision
from mycel.testing.laws import law


def check_decision(
    decision: Decision[Any, Any],
    observations: Iterable[Any],
    exact: Callable[[Any], float] | None = None,
    slack: float = 0.0,
) -> list[float]:
    """Hold a decision to its contract; raise ``AssertionError`` with the law it breaks.

    Parameters
    ----------
    decision : Decision
        What is checked.
    observations : iterable
        Each possible: an action exists.
    exact : callable, optional
        Returns the least cost of any action, found by trying all.
    slack : float
        Share by which a cost may exceed the least one.

    Returns
    -------
    list of float
        Cost over least cost, for each observation (empty without ``exact``).
    """
    ratios = []
    for observation in observations:
        before = copy.deepcopy(observation)
        action = decision.decide(observation)
        law(observation == before, "a decision leaves what it sees as it was")
        law(decision.decide(before) == action, "the same observation leads to the same action")
        law(not decision.fault(observation, action), f"an action is sound: {decision.fault(observation, action)}")
        if exact is not None:
            found, least = decision.cost(observation, action), exact(observation)
            law(found >= least - 1e-9 * abs(least), "nothing is cheaper than the exact solver's answer")
            law(found <= least + slack * abs(least) + 1e-12, f"costs {found:.6g}, where {least:.6g} is possible")
            ratios.append(found / least if least else 1.0)
    return ratios
