"""DeeDiff: after every block of a denoiser a learned head says how wrong its output would be, and each image leaves where that is little.

Delta from ee-diffusion: head = an output layer and an uncertainty after every block, skips = from where the uncertainty is small to the
output, threshold = on the uncertainty, train = outputs and uncertainties on what is to be predicted.

Deviations (the authors' code could not be read; checked against the paper's equations and an independent reproduction,
github.com/razvanmatisan/duodiff):
    - Blocks that an image does not need do not run; the reproduction computes all and picks.
    - By default the model stays as it is and what was added is trained: the reproduction found images to suffer by training both, as the
      paper does (``joint=True``).
    - The weight 1 - u of an exit's loss passes no gradient, so that an exit cannot gain by calling itself uncertain.
    - The uncertainty reads the noise level and not the time step.

Checked against both: the uncertainty is one linear map of state and time under a sigmoid, averaged over tokens; its target is the mean of
|tanh(error)|; both weights are 1; an exit is a layer norm, a linear map and a 3x3 convolution. Not checked: the paper's thresholds; that of
the reproduction's table is the default.

Reference: S. Tang, Y. Wang, C. Ding, Y. Liang, Y. Li, D. Xu. DeeDiff: Dynamic Uncertainty-Aware Early Exiting for Accelerating Diffusion
Model Generation. 2023. arXiv:2309.17074.
"""

from __future__ import annotations

from offramp.core.errors import InvalidInput
from offramp.core.system import Card, Predicate, System
from offramp.exits.denoising import DenoisingExit
from offramp.policies.skips import LearnedExits
from offramp.train.denoising_recipes import UncertaintyAware

CARD = Card(
    name="deediff",
    title="DeeDiff: Dynamic Uncertainty-Aware Early Exiting for Accelerating Diffusion Model Generation",
    authors="Shengkun Tang, Yaqing Wang, Caiwen Ding, Yi Liang, Yao Li, Dongkuan Xu",
    year=2023,
    venue="arXiv",
    arxiv="2309.17074",
    engine="denoise",
    delta_from="ee-diffusion",
    delta={
        "head": "an output layer and an uncertainty after every block",
        "skips": "from where the uncertainty is small to the output",
        "threshold": "on the uncertainty",
        "train": "outputs and uncertainties on what is to be predicted",
    },
    trained=True,
    status="sketch",
    claim="At equal FLOPs the FID is at most that of the best schedule of depths that is the same for every image.",
    predicate=Predicate("gain_over_schedule", ">=", 0.0),
    bibtex="""
        @misc{tang2023deediff,
          title  = {{DeeDiff}: Dynamic Uncertainty-Aware Early Exiting for Accelerating Diffusion Model Generation},
          author = {Tang, Shengkun and Wang, Yaqing and Ding, Caiwen and Liang, Yi and Li, Yao and Xu, Dongkuan},
          year   = {2023},
          eprint = {2309.17074},
          archiveprefix = {arXiv}
        }
    """,
)


def deediff(theta: float = 0.075, joint: bool = False, convolution: bool = True) -> System:
    """Compose DeeDiff.

    Args:
        theta: uncertainty at or below which an image leaves, in [0, 1]; an independent reproduction 0.075.
        joint: train the model along with the exits, as in the paper.
        convolution: whether an exit's output layer ends with a 3x3 convolution; paper yes.

    Raises:
        InvalidInput: ``theta`` is not in [0, 1].
    """
    if not 0 <= theta <= 1:
        raise InvalidInput(f"deediff: theta is an uncertainty in [0, 1] (an independent reproduction 0.075); got {theta}.")
    return System(
        card=CARD, head=DenoisingExit(convolution=convolution), recipe=UncertaintyAware(joint=joint), threshold=-theta, skips=LearnedExits()
    )
