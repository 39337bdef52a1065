"""LayerSkip: one model trained with layer dropout and a loss at every block, whose first blocks draft what all of them verify.

Delta: the base of the methods here that draft from an exit, so none is named.

Deviations from the released code (PyTorch; decoding only, the training code is not in it):
    - Drafts of a round are made, verified and thrown away without a host synchronisation for each, and rows of a batch keep as many drafts
      as each of them may.
    - Every block but the last has its exit, all of them the model's own norm and output layer; one of them drafts.
    - Layer dropout as for continued training: the same at every step. Block 0 alone under an exit has no loss, by the paper's weights.

Checked against the released repository: exit after 8 of 32 blocks and 6 drafts a round for the 7 B model (its commands; for other models
and tasks they also use exits 4, 6 and 10 and 4 or 12 drafts), the shared norm and output layer, and a full pass over the drafts' states.
Title, authors, venue: the proceedings. Not checked, for want of the paper's full text: rate, scale and turn of the rotating curriculum
(from notes). The claim: the abstract reports shorter times than plain decoding on several tasks; measured here as time of plain decoding
over ours.

Reference: M. Elhoushi, A. Shrivastava, D. Liskovich, B. Hosmer, B. Wasti, L. Lai, A. Mahmoud, B. Acun, S. Agarwal, A. Roman, A. A. Aly, B.
Chen, C.-J. Wu. LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding. ACL 2024. arXiv:2404.16710.
"""

from __future__ import annotations

from offramp.core.errors import InvalidInput
from offramp.core.system import Card, Predicate, System
from offramp.exits.lm import Shared
from offramp.exits.placement import EveryBlock
from offramp.policies.decoding import Verify
from offramp.train.text_recipes import EarlyExitLoss, LayerDropout, Rotating

CARD = Card(
    name="layerskip",
    title="LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding",
    authors="Mostafa Elhoushi, Akshat Shrivastava, Diana Liskovich, Basil Hosmer, Bram Wasti, Liangzhen Lai, Anas Mahmoud, Bilge Acun, "
    "Saurabh Agarwal, Ahmed Roman, Ahmed A. Aly, Beidi Chen, Carole-Jean Wu",
    year=2024,
    venue="ACL",
    arxiv="2404.16710",
    engine="generate",
    lossless=True,
    trained=True,
    status="sketch",
    claim="Drafting with the first blocks and verifying with all writes the model's own text in less time than plain decoding.",
    predicate=Predicate("speedup", ">=", 1.0),
    bibtex="""
        @inproceedings{elhoushi2024layerskip,
          title     = {{LayerSkip}: Enabling Early Exit Inference and Self-Speculative Decoding},
          author    = {Elhoushi, Mostafa and Shrivastava, Akshat and Liskovich, Diana and Hosmer, Basil and Wasti, Bram and Lai, Liangzhen and Mahmoud, Anas and Acun, Bilge and Agarwal, Saurabh and Roman, Ahmed and Aly, Ahmed A. and Chen, Beidi and Wu, Carole-Jean},
          booktitle = {Annual Meeting of the Association for Computational Linguistics (ACL)},
          year      = {2024},
          eprint    = {2404.16710},
          archiveprefix = {arXiv}
        }
    """,  # noqa: E501
)


def layerskip(
    blocks: int = 32, exit_after: int | None = None, draft_length: int = 6, dropout: float = 0.1, scale: float = 0.2, rotate: int = 8
) -> System:
    """Compose LayerSkip.

    Args:
        blocks: of the model, at least 2; the paper's Llama 2 7B has 32.
        exit_after: blocks that draft, from 1 to ``blocks`` - 1; a quarter of them by default, as the release uses 8 of 32.
        draft_length: drafts in a round, at least 1; the release 6.
        dropout: chance that the last block is skipped in training, in [0, 1]; paper 0.1 to 0.2.
        scale: weight of the early exits' losses, >= 0; paper 0.1 to 1.
        rotate: every so many-th exit takes part in a step, at least 1; paper 8 of 32 for the 7 B model.
    """
    exit_after = max(1, blocks // 4) if exit_after is None else exit_after
    if not 0 < exit_after < blocks:
        raise InvalidInput(f"exit_after must be from 1 to blocks - 1, got {exit_after} of {blocks}.")
    return System(
        card=CARD,
        head=Shared(),
        placement=EveryBlock(),
        recipe=LayerDropout(EarlyExitLoss(tuple(range(1, blocks)), blocks, scale, Rotating(rotate)), dropout),
        draft=Verify(draft_length, exit_index=exit_after - 1),
    )
