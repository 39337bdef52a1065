"""LaTtE-Flow: the layers of a flow transformer are split into groups, each the expert for a part of the noise levels.

Delta from ee-diffusion: skips = all blocks but one group, which the noise level chooses, train = every group on its own levels.

Deviations (no code was released; rebuilt from the paper's description in reviews and notes):
    - The residual attention over earlier layers, gated by the time step, is left out: its exact form is in no code.
    - For image denoisers; the paper adds image generation to a vision-language model, whose own layers stay frozen.
    - The parts are equal in time. Blocks of a group run with the state that the patches were embedded to, since those before are skipped.

Checked against the abstract: layers in groups, each responsible for a subset of time steps, and only that group is active at a step. Not
checked: the number of groups of the released models; 4 is this library's choice. A model that was not trained so gives noise.

Reference: Y. Shen, Z. Xu, J. Chen, S. Diao, J. Zhang, Y. Yao, J. Rimchala, I. Lourentzou, L. Huang. LaTtE-Flow: Layerwise Timestep-Expert
Flow-based Transformer. 2025. arXiv:2506.06952.
"""

from __future__ import annotations

from offramp.core.errors import InvalidInput
from offramp.core.system import Card, Predicate, System
from offramp.policies.skips import LayerGroups
from offramp.train.recipe import FinalOnly, Joint

CARD = Card(
    name="latte-flow",
    title="LaTtE-Flow: Layerwise Timestep-Expert Flow-based Transformer",
    authors="Ying Shen, Zhiyang Xu, Jiuhai Chen, Shizhe Diao, Jiaxin Zhang, Yuguang Yao, Joy Rimchala, Ismini Lourentzou, Lifu Huang",
    year=2025,
    venue="arXiv",
    arxiv="2506.06952",
    engine="denoise",
    delta_from="ee-diffusion",
    delta={"skips": "all blocks but one group, which the noise level chooses", "train": "every group on its own levels"},
    trained=True,
    status="sketch",
    claim="Groups of layers that are experts for a part of the levels give at most the FID of one group of that size for all levels.",
    predicate=Predicate("gain_over_shallow", ">=", 0.0),
    bibtex="""
        @misc{shen2025latteflow,
          title  = {{LaTtE-Flow}: Layerwise Timestep-Expert Flow-based Transformer},
          author = {Shen, Ying and Xu, Zhiyang and Chen, Jiuhai and Diao, Shizhe and Zhang, Jiaxin and Yao, Yuguang and Rimchala, Joy and Lourentzou, Ismini and Huang, Lifu},
          year   = {2025},
          eprint = {2506.06952},
          archiveprefix = {arXiv}
        }
    """,  # noqa: E501
)


def latte_flow(groups: int = 4) -> System:
    """Compose LaTtE-Flow.

    Args:
        groups: K of layers, at least 2; divides the number of blocks, and about 1 / K of them run at a step.

    Raises:
        InvalidInput: ``groups`` is below 2.
    """
    if not groups >= 2:
        raise InvalidInput(f"latte-flow: groups must be at least 2 and divide the denoiser's number of blocks; got {groups}.")
    return System(card=CARD, recipe=Joint(FinalOnly()), skips=LayerGroups(groups))
