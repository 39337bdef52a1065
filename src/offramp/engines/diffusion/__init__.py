"""Engines for models that denoise step by step.

`offramp.engines.diffusion.denoise` stands in for a denoiser within its pipeline; `step` and `straight` carry out decisions and fixed plans,
`graphs` captures them; `regions` computes some tokens only; `calibrate` chooses thresholds; `unmask` is for masked language models.
"""
