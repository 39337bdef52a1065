"""Random skip: each image reuses the later blocks at steps drawn by lot. The control that a measured signal must beat.

Delta from first-block-cache: skips = at random, threshold = on a uniform number.

Deviations: none that is known; in the cited paper blocks are dropped at random in training, here they are reused at random in sampling.

Checked against no code: it is a control, the cited paper the first to drop blocks at random.

Reference: G. Huang, Y. Sun, Z. Liu, D. Sedra, K. Weinberger. Deep Networks with Stochastic Depth. ECCV 2016. arXiv:1603.09382.
"""

from __future__ import annotations

from offramp.core.errors import InvalidInput
from offramp.core.system import Card, Predicate, System
from offramp.policies.denoising import Chance, Guard
from offramp.policies.skips import AfterFirst, Reuse

CARD = Card(
    name="random-skip",
    title="Deep Networks with Stochastic Depth",
    authors="Gao Huang, Yu Sun, Zhuang Liu, Daniel Sedra, Kilian Weinberger",
    year=2016,
    venue="ECCV",
    arxiv="1603.09382",
    engine="denoise",
    delta_from="first-block-cache",
    delta={"skips": "at random", "threshold": "on a uniform number"},
    trained=False,
    status="sketch",
    claim="Reuse at random steps never has a lower FID than the full model.",
    predicate=Predicate("fid_ratio", ">=", 1.0, over="worst"),
    bibtex="""
        @inproceedings{huang2016deep,
          title     = {Deep Networks with Stochastic Depth},
          author    = {Huang, Gao and Sun, Yu and Liu, Zhuang and Sedra, Daniel and Weinberger, Kilian},
          booktitle = {European Conference on Computer Vision (ECCV)},
          year      = {2016}
        }
    """,
)


def random_skip(rate: float = 0.5, max_reuse: int | None = None, seed: int = 0) -> System:
    """Compose the control.

    Args:
        rate: share of the steps that reuse, in [0, 1]; the first and the last do not.
        max_reuse: steps in a row that may reuse, at least 0; ``None`` = any number.
        seed: of the lot. An image's draws do not depend on its batch mates.

    Raises:
        InvalidInput: ``rate`` is not in [0, 1].
    """
    if not 0 <= rate <= 1:
        raise InvalidInput(f"random-skip: rate is a share of the steps in [0, 1]; got {rate}.")
    return System(card=CARD, threshold=1 - rate, skips=Reuse(AfterFirst(1), Chance(seed), guard=Guard(max_reuse, 1, True)))
