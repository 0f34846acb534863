"""Trains prompt refiners: supervised on pairs, then by group-relative policy optimisation on rewards."""
