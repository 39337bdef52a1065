"""ASE: a diffusion transformer runs fewer blocks the noisier its input is, by a list that is the same for every image.

Delta: none, it changes no method here. Axis: depth by noise level; fill = the hidden state as it is, to the model's final layers; train =
the whole model under the schedule, without its time embedder.

Deviations from the released code (PyTorch, github.com/taehong-moon/ee-diffusion):
    - The list is read by noise level, not by time step, so that it serves any sampler, flows too; rows of one batch may stand at different
      levels, where the release reads the first row's.
    - Rows skip what they do not need in training too; the release computes all blocks and picks.
    - In a model of another depth every entry of the list keeps its share of the blocks. Only the list for 28 blocks was released.
    - The U-ViT variant, which drops decoder blocks and keeps the layers that merge the skips, is not in the release, nor here.

Checked against the released code: the list 28, 28, 24, 24, 20, 20, 16, 16, 12, 12 over ten equal parts of the time steps, nearly clean
first; no heads; the time embedder is frozen; the usual loss on the noise. Not checked: the learning rate of the paper's other models.

Reference: T. Moon, M. Choi, E. Yun, J. Yoon, G. Lee, J. Cho, J. Lee. A Simple Early Exiting Framework for Accelerated Sampling in Diffusion
Models. ICML 2024. arXiv:2408.05927.
"""

from __future__ import annotations

from offramp.budget import PUBLISHED_DEPTHS
from offramp.core.system import Card, Predicate, System
from offramp.policies.skips import DepthSchedule
from offramp.train.denoising_recipes import Holding

CARD = Card(
    name="ee-diffusion",
    title="A Simple Early Exiting Framework for Accelerated Sampling in Diffusion Models",
    authors="Taehong Moon, Moonseok Choi, EungGu Yun, Jongmin Yoon, Gayoung Lee, Jaewoong Cho, Juho Lee",
    year=2024,
    venue="ICML",
    arxiv="2408.05927",
    engine="denoise",
    trained=True,
    status="sketch",
    claim="Trained under a schedule of three quarters of the FLOPs, the model's FID is at most a tenth above that of all blocks.",
    predicate=Predicate("fid_ratio", "<=", 1.1, budget=0.75),
    bibtex="""
        @inproceedings{moon2024simple,
          title     = {A Simple Early Exiting Framework for Accelerated Sampling in Diffusion Models},
          author    = {Moon, Taehong and Choi, Moonseok and Yun, EungGu and Yoon, Jongmin and Lee, Gayoung and Cho, Jaewoong and Lee, Juho},
          booktitle = {International Conference on Machine Learning (ICML)},
          year      = {2024}
        }
    """,
)


def ee_diffusion(depths: tuple[int, ...] = PUBLISHED_DEPTHS, of: int = PUBLISHED_DEPTHS[0]) -> System:
    """Compose ASE.

    Args:
        depths: blocks that run in each of equal parts of the time steps, nearly clean first; the release 28, 28, 24, ..., 12, 12.
        of: blocks of the model that the list is for, at least its largest entry; DiT-XL/2 has 28.
    """
    return System(card=CARD, recipe=Holding(), skips=DepthSchedule(tuple(depths), of))
