"""Models: finding and opening a base, and the trainables that live over it."""
