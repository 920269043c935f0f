"""Attacks: what a guard is worth is what is left of them."""
