"""Refiners: `softener` (a data file, milliseconds, no model) and `causal_lm` (any causal language model).

The language model behind the latter is one of `torch_lm`, `onnx_lm` and `genai_lm`, all of one protocol,
`language_model.LanguageModel`.
"""
