"""DeepCache: a U-Net computes its deep part at every N-th step of the sampler and reuses what it made in between.

Delta: none, it changes no method here. Axis: the deep part of a U-Net by step; fill = what it made when it was last computed, beside skips
that are new; nothing is trained or measured.

Deviations from the released code (PyTorch, github.com/horseee/DeepCache):
    - A branch is a down block and the up block that mirrors it. The release counts layers inside blocks too, three to a block.
    - The step is counted from the first one of each image and each guidance branch; the release looks the time step up in the sampler's
      list, which is wrong where one occurs twice.
    - In a transformer, which the paper does not treat, the deep part is all blocks but the first and the last, and what is reused is what
      they added: its state goes straight through, and their output alone would forget what ran before.
    - `calibrate` finds the steps that compute for a cost; the paper's uneven steps are `offramp.budget.power_plan`.

Checked against the released code: every N-th step from the first, branch 0 as the shallowest; the helper's default computes every step
(N = 1), its examples N = 3; experiments 2 to 10. The claim is the abstract's: at equal cost at least as good as fewer steps.

Reference: X. Ma, G. Fang, X. Wang. DeepCache: Accelerating Diffusion Models for Free. CVPR 2024. arXiv:2312.00858.
"""

from __future__ import annotations

from offramp.core.errors import InvalidInput
from offramp.core.system import Card, Predicate, System
from offramp.policies.denoising import Every
from offramp.policies.skips import Deep, Reuse

CARD = Card(
    name="deepcache",
    title="DeepCache: Accelerating Diffusion Models for Free",
    authors="Xinyin Ma, Gongfan Fang, Xinchao Wang",
    year=2024,
    venue="CVPR",
    arxiv="2312.00858",
    engine="denoise",
    trained=False,
    status="sketch",
    claim="At equal FLOPs the FID is at most that of a sampler with fewer steps.",
    predicate=Predicate("gain_over_steps", ">=", 0.0),
    bibtex="""
        @inproceedings{ma2024deepcache,
          title     = {{DeepCache}: Accelerating Diffusion Models for Free},
          author    = {Ma, Xinyin and Fang, Gongfan and Wang, Xinchao},
          booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
          year      = {2024}
        }
    """,
)


def deepcache(interval: int = 3, branch: int = 0) -> System:
    """Compose DeepCache.

    Args:
        interval: N, the deep part is computed at every N-th step, at least 1; typically 3 to 5, the release's examples 3.
        branch: the skip connection above which everything is computed, at least 0, the shallowest; paper 0 for large savings.

    Raises:
        InvalidInput: ``interval`` is below 1.
    """
    if not interval >= 1:
        raise InvalidInput(f"deepcache: interval must be at least 1 (1 computes every step, 3 every third); got {interval}.")
    return System(card=CARD, skips=Reuse(Deep(branch), Every(interval)))
