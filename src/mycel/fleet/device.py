"""Devices, the links that join them to a coordinator, and what a piece of work takes on them.

Durations follow from these descriptions and never from a stopwatch, so the order of events is the same on any
machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Link:
    """A link as seen from the device: rates in megabits per second, latency in milliseconds one way, money per GiB."""

    up_mbps: float = 20.0
    down_mbps: float = 100.0
    latency_ms: float = 20.0
    price_per_gib: float = 0.0

    def up_seconds(self, size: int) -> float:
        """Seconds for ``size`` bytes from the device to the coordinator."""
        return self.latency_ms / 1e3 + 8e-6 * size / self.up_mbps

    def down_seconds(self, size: int) -> float:
        """Seconds for ``size`` bytes from the coordinator to the device."""
        return self.latency_ms / 1e3 + 8e-6 * size / self.down_mbps


@dataclass(frozen=True)
class Device:
    """One machine: sustained speed, memory, and how often it answers.

    Attributes
    ----------
    gflops : float
        Sustained training speed in 10^9 floating-point operations a second.
    memory_gib : float
        Memory it lends.
    watts : float
        Power drawn while it works.
    price_per_hour : float
        Money that an hour of it costs, in whatever currency the fleet counts.
    reliability : float
        Probability that an answer it was asked for is sent; the rest vanish without a word.
    unreachable : tuple of str
        Devices that it has no link to; the same is true the other way.
    """

    name: str
    gflops: float = 50.0
    memory_gib: float = 8.0
    watts: float = 30.0
    price_per_hour: float = 0.0
    reliability: float = 1.0
    link: Link = field(default_factory=Link)
    unreachable: tuple[str, ...] = ()

    def reaches(self, other: Device) -> bool:
        """Whether there is a link to another device."""
        return other.name not in self.unreachable and self.name not in other.unreachable

    def compute_seconds(self, flops: float) -> float:
        """Seconds for ``flops`` floating-point operations."""
        return flops / (self.gflops * 1e9)


@dataclass(frozen=True)
class Fleet:
    """Devices by node index; a short profile repeats over a longer list of nodes.

    Attributes
    ----------
    calibration : dict of str to float
        How these devices depart from their nominal speed, as ``mycel fleet probe`` found: the fields of
        ``decisions.cost.Coefficients``.
    """

    name: str
    devices: tuple[Device, ...]
    calibration: dict[str, float] = field(default_factory=dict)

    def __getitem__(self, node: int) -> Device:
        return self.devices[node % len(self.devices)]
