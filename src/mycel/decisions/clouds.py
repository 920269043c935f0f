"""Where clouds meet, how often, and which of them: the least money within a deadline, egress counted by its price.

Every round each cloud but the hub pays to send its change, and the hub pays to send the new weights to each; what comes
in is free, as clouds price it. Local steps are shared out in proportion to speed, so that all clouds end together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from math import ceil

from mycel.decisions.contract import Decision
from mycel.errors import RecipeError

GIB = 1 << 30


@dataclass(frozen=True)
class Cloud:
    """One cloud.

    Attributes
    ----------
    speed : float
        Steps a second.
    hour, egress : float
        Price of an hour, and of a GiB that leaves.
    bandwidth : float
        Bytes a second, either way.
    """

    name: str
    speed: float
    hour: float
    egress: float
    bandwidth: float


@dataclass(frozen=True)
class Market:
    """What is to be trained, and where it could be.

    Attributes
    ----------
    steps : int
        Of all clouds together.
    up, down : float
        Bytes of a change and of the weights.
    periods : tuple of int
        Local steps of a cloud between two meetings, on average; the longest that quality bears is the last.
    deadline : float
        Seconds.
    """

    clouds: tuple[Cloud, ...]
    steps: int
    up: float
    down: float
    periods: tuple[int, ...]
    deadline: float


@dataclass(frozen=True)
class Meeting:
    """Who takes part, where they meet, after how many local steps of each on average."""

    members: tuple[int, ...]
    hub: int
    period: int


class Cheapest(Decision[Market, Meeting]):
    """The cheapest of all meetings that keep the deadline; at one price the faster."""

    def decide(self, observation: Market) -> Meeting:
        """Return the meeting; ``RecipeError`` names the fastest when none is in time."""
        found = list(meetings(observation))
        timely = [each for each in found if not self.fault(observation, each)]
        if not timely:
            fastest = min(seconds(observation, each) for each in found)
            raise RecipeError(
                f"the deadline is {observation.deadline:,.0f} s and the fastest plan takes {fastest:,.0f} s: "
                "allow more time, longer periods or a smaller codec, or add a cloud"
            )
        return min(timely, key=lambda each: (self.cost(observation, each), seconds(observation, each)))

    def fault(self, observation: Market, action: Meeting) -> str:
        """The deadline is kept, at a member's."""
        if action.hub not in action.members:
            return "the hub takes no part"
        taken = seconds(observation, action)
        return f"takes {taken:,.0f} s of {observation.deadline:,.0f}" if taken > observation.deadline else ""

    def cost(self, observation: Market, action: Meeting) -> float:
        """Money of the whole training."""
        hours = seconds(observation, action) / 3600
        renting = sum(observation.clouds[member].hour for member in action.members) * hours
        return renting + rounds(observation, action) * egress(observation, action)


def meetings(market: Market) -> Iterator[Meeting]:
    """Every set of clouds, hub and period; one cloud alone never meets."""
    for count in range(1, len(market.clouds) + 1):
        for members in combinations(range(len(market.clouds)), count):
            for hub in members:
                for period in market.periods if count > 1 else market.periods[-1:]:
                    yield Meeting(members, hub, period)


def rounds(market: Market, meeting: Meeting) -> int:
    """Meetings of the whole training."""
    if len(meeting.members) == 1:
        return 0
    return ceil(market.steps / (meeting.period * len(meeting.members)))


def egress(market: Market, meeting: Meeting) -> float:
    """Money that leaves with the bytes of one meeting."""
    others = [member for member in meeting.members if member != meeting.hub]
    sent = sum(market.up / GIB * market.clouds[member].egress for member in others)
    return sent + len(others) * market.down / GIB * market.clouds[meeting.hub].egress


def seconds(market: Market, meeting: Meeting) -> float:
    """Seconds of the whole training: computing in proportion to speed, and transfers through the hub's one link."""
    computing = market.steps / sum(market.clouds[member].speed for member in meeting.members)
    hub = market.clouds[meeting.hub].bandwidth
    others = [market.clouds[member].bandwidth for member in meeting.members if member != meeting.hub]
    travel = (
        sum(
            max(len(others) * size / hub, *(size / bandwidth for bandwidth in others))
            for size in (market.up, market.down)
        )
        if others
        else 0.0
    )
    return computing + rounds(market, meeting) * travel


def shared_steps(speeds: list[float], mean: int) -> list[int]:
    """Local steps of each cloud, in proportion to speed, ``mean`` on average, at least one each."""
    total = mean * len(speeds)
    return [max(1, round(total * speed / sum(speeds))) for speed in speeds]
