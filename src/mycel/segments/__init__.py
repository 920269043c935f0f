"""Segments: one model in pieces on different machines; tensors cross the cuts, gradients cross them back."""
