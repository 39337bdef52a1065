"""Engines for models that write token by token.

`offramp.engines.text.generate` is the reference and knows every way of decoding; `rounds` is its captured form; `generator` is what a user
holds and chooses between them; `planner` decides which drafts pay.
"""
