"""Serving: one file for each system, thin, over the generation service and over segments."""
