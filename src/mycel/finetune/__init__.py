"""Tuning: one file per system."""
