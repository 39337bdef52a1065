"""First-block cache: each image reuses what all later blocks added, as long as what the first block adds has hardly changed.

Delta from deepcache: skips = everything after the first block, where a measured change of the first block's residual allows it, threshold =
on that change.

Deviations from the code that is in use (diffusers 0.42, hooks/first_block_cache.py, after ParaAttention):
    - Every image of a batch decides for itself, and so does each guidance branch; there one mean over the batch decides for all.
    - At most two steps in a row reuse, and the first and last steps are computed; there is no such limit (``max_reuse=None`` and
      ``ends=False``). Without it an image whose first block changes slowly may never be computed again.
    - A change that is not a number computes; there it reuses or not by how a comparison with NaN happens to be written.
    - In a U-Net the first block is the first down block, whose output is compared as it is, and the deep part is what is reused.

Checked against the code: the mean absolute change over the mean absolute value, since the last computed step; threshold 0.05; the first
block's output plus what the others added. There is no paper. The claim is what caches are used for: at equal cost at least as good as fewer
steps.

Reference: Z. Cheng. ParaAttention: Context Parallel Attention that Accelerates DiT Model Inference with Dynamic Caching. 2024. Software.
"""

from __future__ import annotations

from offramp.core.errors import InvalidInput
from offramp.core.system import Card, Predicate, System
from offramp.policies.denoising import Guard, ResidualChange
from offramp.policies.skips import AfterFirst, Reuse

CARD = Card(
    name="first-block-cache",
    title="ParaAttention: Context Parallel Attention that Accelerates DiT Model Inference with Dynamic Caching",
    authors="Zeyi Cheng",
    year=2024,
    venue="software",
    engine="denoise",
    delta_from="deepcache",
    delta={"skips": "everything after the first block, where its residual has hardly changed", "threshold": "on that change"},
    trained=False,
    status="sketch",
    claim="At equal FLOPs the FID is at most that of a sampler with fewer steps.",
    predicate=Predicate("gain_over_steps", ">=", 0.0),
    bibtex="""
        @misc{cheng2024paraattention,
          title  = {{ParaAttention}: Context Parallel Attention that Accelerates {DiT} Model Inference with Dynamic Caching},
          author = {Cheng, Zeyi},
          year   = {2024},
          howpublished = {github.com/chengzeyi/ParaAttention}
        }
    """,
)


def first_block_cache(change: float = 0.05, max_reuse: int | None = 2, ends: bool = True) -> System:
    """Compose a first-block cache.

    Args:
        change: relative change of the first block's residual below which the rest is reused, >= 0; 0 reuses nothing. In use 0.05.
        max_reuse: steps in a row that may reuse, at least 0; ``None`` = any number, as in the code in use.
        ends: compute the last step as well as the first.

    Raises:
        InvalidInput: ``change`` is below 0 or not a number.
    """
    if not change >= 0:
        raise InvalidInput(f"first-block-cache: change is a relative change, at least 0 (0 reuses nothing, in use 0.05); got {change}.")
    return System(card=CARD, threshold=-change, skips=Reuse(AfterFirst(1), ResidualChange(), guard=Guard(max_reuse, 1, ends)))
