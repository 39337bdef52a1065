"""RAS: at most steps only the tokens in focus go through the denoiser; the others keep their last output, keys and values.

Delta: none, it changes no method here. Axis: tokens of the image by step; which are computed is told by the denoiser's last output; what is
not computed is as it was, and is still attended to. Nothing is trained.

Deviations from the released code (github.com/microsoft/RAS):
    - A token's waiting raises its priority. There the factor exp(0.1 times) is put on a measure of which the smallest are computed, so that
      waiting lowers it and what is left out stays out; ``direction=-1`` does that.
    - Waiting counts the steps since a token was last computed. There it counts every step at which it was left out, and starts far below
      zero, which is the same for all.
    - Every image and every guidance branch has tokens of its own, equally many. There it is one image, whose branches share them.
    - Number of steps, sampler and shape of the image are free. There it is a rectified flow by Euler's method and square images. Dense
      steps in between may be given by noise level (`offramp.reduce.regions.AtLevels`).
    - Both ends of the measure cannot be left out at once (``high_ratio`` between 0 and 1).
    - A ratio that changes does so with the noise level, not every few steps.

Checked against the released code: the deviation over channels, averaged over a token's pixels; the smallest are computed; half of the
tokens; kappa 0.1; four dense steps first, and steps 12 and 22 of 30; multiples of 64 where the ratio changes; keys and values of all tokens
stay in every block. The claim is what caches are used for: at equal cost at least as good as fewer steps.

Reference: Z. Liu, Y. Yang, C. Zhang, Y. Zhang, L. Qiu, Y. You, Y. Yang. Region-Adaptive Sampling for Diffusion Transformers. CVPR 2026.
arXiv:2502.10389.
"""

from __future__ import annotations

from offramp.core.system import Card, Predicate, System
from offramp.reduce.regions import AtSteps, ChannelNorm, ChannelSpread, Regions

CARD = Card(
    name="ras",
    title="Region-Adaptive Sampling for Diffusion Transformers",
    authors="Ziming Liu, Yifan Yang, Chengruidong Zhang, Yiqi Zhang, Lili Qiu, Yang You, Yuqing Yang",
    year=2026,
    venue="CVPR",
    arxiv="2502.10389",
    engine="denoise",
    trained=False,
    status="sketch",
    claim="At equal FLOPs the FID is at most that of a sampler with fewer steps.",
    predicate=Predicate("gain_over_steps", ">=", 0.0),
    bibtex="""
        @inproceedings{liu2026region,
          title     = {Region-Adaptive Sampling for Diffusion Transformers},
          author    = {Liu, Ziming and Yang, Yifan and Zhang, Chengruidong and Zhang, Yiqi and Qiu, Lili and You, Yang and Yang, Yuqing},
          booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
          year      = {2026}
        }
    """,
)


def ras(
    ratio: float = 0.5,
    first: int = 4,
    resets: tuple[int, ...] = (12, 22),
    staleness: float = 0.1,
    direction: int = 1,
    change: float = 0.0,
    multiple: int = 8,
    norm: bool = False,
) -> System:
    """Compose region-adaptive sampling.

    Args:
        ratio: share of the tokens that are computed at steps that are not dense, in (0, 1]. Paper 0.5.
        first: dense steps at the start, at least 1. Paper 4.
        resets: steps in between that are dense, from 0. Paper 12 and 22, of 30.
        staleness: kappa, weight of a token's waiting, at least 0. Paper 0.1.
        direction: 1, waiting raises the priority; -1, it lowers it, as released.
        change: what the ratio gains from noise to data. Paper 0.
        multiple: tokens are rounded up to a multiple, at least 1. Paper 64, of images of 4096.
        norm: measure the Euclidean norm over channels, not their deviation. Paper False; images of one channel have no deviation.
    """
    regions = Regions(
        ratio,
        ChannelNorm() if norm else ChannelSpread(),
        first=first,
        resets=AtSteps(tuple(resets)),
        staleness=staleness,
        direction=direction,
        change=change,
        multiple=multiple,
    )
    return System(card=CARD, reduction=regions)
