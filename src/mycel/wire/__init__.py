"""The ground that everything travels on: parcels, codecs, the byte meter, shared randomness."""
