"""Who takes part, over which links, and when: descriptions and time, no traffic."""

from mycel.fleet.clock import VirtualLoop, run_virtual
from mycel.fleet.device import Device, Fleet, Link
from mycel.fleet.profiles import PROFILES, load_fleet

__all__ = ["PROFILES", "Device", "Fleet", "Link", "VirtualLoop", "load_fleet", "run_virtual"]
