"""Decisions: something must choose, with the same pure object in the simulator and in the live runtime."""
