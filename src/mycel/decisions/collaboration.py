"""How many devices work on each token together, and with what shares, so that a token comes soonest or batteries last.

Time per token with device set S and shares w: max_i w_i F / v_i + 2 L (latency x hops + bytes x 2 (n - 1) / (n B)),
with F operations per token, v_i operations a second, L layers, and links of bandwidth B. Shares are whole heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from mycel.decisions.contract import Decision
from mycel.decisions.shares import shares
from mycel.errors import EngineError

Shares = tuple[int, ...]


@dataclass(frozen=True)
class Devices:
    """Devices around one model.

    Attributes
    ----------
    speed : tuple of float
        Operations a second of each.
    room : tuple of int
        Most heads whose weights and keys fit into each.
    heads, layers : int
        Of the model.
    operations : float
        Per token.
    width : int
        Numbers of a hidden state.
    latency, bandwidth : float
        Seconds one way, and bytes a second, of the links.
    energy : tuple of float
        Joules left in each battery; empty: plugged in.
    joules : tuple of float
        Per head and token, on each device.
    """

    speed: tuple[float, ...]
    room: tuple[int, ...]
    heads: int
    layers: int
    operations: float
    width: int
    latency: float
    bandwidth: float
    energy: tuple[float, ...] = ()
    joules: tuple[float, ...] = ()


class Quickest(Decision[Devices, Shares]):
    """The fastest devices first, as many as make a token come soonest; shares in proportion to speed."""

    def decide(self, observation: Devices) -> Shares:
        """Return the heads of each device, 0 for those that stay out; ``EngineError`` when memory does not suffice."""
        order = sorted(range(len(observation.speed)), key=lambda d: (-observation.speed[d], d))
        sets = [order[:count] for count in range(1, min(len(order), observation.heads) + 1)]
        found = [each for chosen in sets if (each := self.share(observation, chosen)) is not None]
        if not found:
            raise EngineError(f"{observation.heads} heads do not fit into {sum(observation.room)} places: add devices")
        return min(found, key=lambda each: seconds_per_token(observation, each))

    def share(self, seen: Devices, chosen: list[int]) -> Shares | None:
        """Return shares over a set of devices, or None when they do not fit."""
        return fitted(seen, chosen, [seen.speed[device] for device in chosen])

    def fault(self, observation: Devices, action: Shares) -> str:
        """All heads are held, nowhere more than fit."""
        if sum(action) != observation.heads:
            return f"{sum(action)} of {observation.heads} heads are held"
        over = [d for d, heads in enumerate(action) if not 0 <= heads <= observation.room[d]]
        return f"device {over[0]} has no room for its heads" if over else ""

    def cost(self, observation: Devices, action: Shares) -> float:
        """Return the seconds of one token."""
        return seconds_per_token(observation, action)


class Lasting(Quickest):
    """Shares that empty all batteries at the same time, as far as a token takes at most ``slack`` longer for it."""

    def __init__(self, slack: float = 0.2) -> None:
        self.slack = slack

    def decide(self, observation: Devices) -> Shares:
        """Return the heads of each device."""
        quick = super().decide(observation)
        limit = (1 + self.slack) * seconds_per_token(observation, quick)
        chosen = [device for device, heads in enumerate(quick) if heads]
        lasting = [observation.energy[d] / observation.joules[d] for d in chosen]
        speeds = [observation.speed[d] for d in chosen]
        for part in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1):
            mixed = [
                part * a / sum(lasting) + (1 - part) * b / sum(speeds) for a, b in zip(lasting, speeds, strict=True)
            ]
            found = fitted(observation, chosen, mixed)
            if found is not None and seconds_per_token(observation, found) <= limit:
                return found
        return quick


def fitted(seen: Devices, chosen: list[int], weights: list[float]) -> Shares | None:
    """Return whole heads in proportion to ``weights``, what does not fit going to those with room."""
    if sum(seen.room[device] for device in chosen) < seen.heads or any(not seen.room[d] for d in chosen):
        return None
    counts = {d: min(len(mine), seen.room[d]) for d, mine in zip(chosen, shares(seen.heads, weights), strict=True)}
    while (left := seen.heads - sum(counts.values())) > 0:
        open_ones = [d for d in chosen if counts[d] < seen.room[d]]
        counts[min(open_ones, key=lambda d: (counts[d] + 1) / weights[chosen.index(d)])] += min(left, 1)
    return tuple(counts.get(device, 0) for device in range(len(seen.speed)))


def seconds_per_token(seen: Devices, action: Shares) -> float:
    """Return the seconds of one token."""
    working = [device for device, heads in enumerate(action) if heads]
    computing = max(action[d] / seen.heads * seen.operations / seen.speed[d] for d in working)
    size = len(working)
    if size == 1:
        return computing
    one_sum = 2 * seen.latency + 4 * seen.width * 2 * (size - 1) / size / seen.bandwidth
    return computing + 2 * seen.layers * one_sum


def tokens_until_empty(seen: Devices, action: Shares) -> float:
    """Return how many tokens are made before the first battery is empty."""
    return min(seen.energy[d] / (heads * seen.joules[d]) for d, heads in enumerate(action) if heads)
