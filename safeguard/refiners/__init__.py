"""Refiners: `softener` (a data file, milliseconds, no model) and `causal_lm` (any causal language model)."""
