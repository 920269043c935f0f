"""Evaluation: held-out loss, greedy generation and text metrics."""
