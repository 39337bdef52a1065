"""Few steps: the full model and a sampler with fewer steps. The first control of every method that makes steps cheaper.

Delta: none, it changes no method here. Axis: the number of steps.

Deviations: none that is known; the sampler's own way of spacing fewer steps is used.

Checked against no code: the samplers are the user's, and their own spacing of fewer steps is what is measured.

Reference: J. Song, C. Meng, S. Ermon. Denoising Diffusion Implicit Models. ICLR 2021. arXiv:2010.02502.
"""

from __future__ import annotations

from offramp.core.system import Card, Predicate, System
from offramp.policies.skips import FewerSteps

CARD = Card(
    name="few-steps",
    title="Denoising Diffusion Implicit Models",
    authors="Jiaming Song, Chenlin Meng, Stefano Ermon",
    year=2021,
    venue="ICLR",
    arxiv="2010.02502",
    engine="denoise",
    trained=False,
    status="sketch",
    claim="With half of the steps the FID is at most a tenth above that of all steps.",
    predicate=Predicate("fid_ratio", "<=", 1.1, budget=0.5),
    bibtex="""
        @inproceedings{song2021denoising,
          title     = {Denoising Diffusion Implicit Models},
          author    = {Song, Jiaming and Meng, Chenlin and Ermon, Stefano},
          booktitle = {International Conference on Learning Representations (ICLR)},
          year      = {2021}
        }
    """,
)


def few_steps(share: float = 0.5) -> System:
    """Compose the control.

    Args:
        share: of the steps that are asked for, in (0, 1]; rounded down, one at least.
    """
    return System(card=CARD, skips=FewerSteps(share))
