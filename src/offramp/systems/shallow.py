"""Shallow: the first blocks of a denoiser and its final layers, at every step. The control of methods that vary depth.

Delta from ee-diffusion: skips = the same blocks at every noise level, train = the first blocks alone.

Deviations: none that is known; the cited paper trains models of several depths and widths, here depth alone changes.

Checked against no code: it is a control, the cited paper the one whose models differ in depth.

Reference: W. Peebles, S. Xie. Scalable Diffusion Models with Transformers. ICCV 2023. arXiv:2212.09748.
"""

from __future__ import annotations

from offramp.core.system import Card, Predicate, System
from offramp.policies.skips import ConstantDepth
from offramp.train.recipe import FinalOnly, Joint

CARD = Card(
    name="shallow",
    title="Scalable Diffusion Models with Transformers",
    authors="William Peebles, Saining Xie",
    year=2023,
    venue="ICCV",
    arxiv="2212.09748",
    engine="denoise",
    delta_from="ee-diffusion",
    delta={"skips": "the same blocks at every noise level", "train": "the first blocks alone"},
    trained=True,
    status="sketch",
    claim="A model of fewer blocks has a higher FID than one of all blocks.",
    predicate=Predicate("fid_ratio", ">=", 1.0),
    bibtex="""
        @inproceedings{peebles2023scalable,
          title     = {Scalable Diffusion Models with Transformers},
          author    = {Peebles, William and Xie, Saining},
          booktitle = {IEEE/CVF International Conference on Computer Vision (ICCV)},
          year      = {2023}
        }
    """,
)


def shallow(share: float = 0.5) -> System:
    """Compose the control.

    Args:
        share: of the blocks that run, inside (0, 1).
    """
    return System(card=CARD, recipe=Joint(FinalOnly()), skips=ConstantDepth(share))
