"""What carries a parcel to a node and its answer back."""
