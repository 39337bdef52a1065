"""Sorted LLaMA: fine-tuning on the mean loss of nested sub-models, so that the first blocks and the model's own head are a model.

Delta from layerskip: axis = sub-models of 12 to 36 of 40 blocks, train = the plain mean of the sub-models' losses, without layer dropout,
draft = the smallest sub-model, four drafts a round.

Deviations (rebuilt from the abstract and from notes on the paper):
    - `offramp reproduce` continues to train on plain text; the paper fine-tunes on instructions and judges answers.
    - The number of drafts of a round is a choice of this library.

Checked against the abstracts of both versions: title, authors, sub-models that share all weights with the model, fine-tuning at the cost
of ordinary fine-tuning, and the claim (first version): half of the time while performance is kept. Kept is taken as a perplexity of at
most 1.05 times the full model's, fine-tuned alone for as many steps; the 5 % is this library's, and perplexity stands in for the judged
answers. Not checked, for want of the paper's full text: which blocks, equal weights, and the smallest sub-model as the draft.

Reference: P. Kavehzadeh, M. Valipour, M. Tahaei, A. Ghodsi, B. Chen, M. Rezagholizadeh. Sorted LLaMA: Unlocking the Potential of
Intermediate Layers of Large Language Models for Dynamic Inference. Findings of EACL 2024. arXiv:2309.08968.
"""

from __future__ import annotations

from offramp.core.system import Card, Predicate, System
from offramp.exits.lm import Shared
from offramp.exits.placement import AfterBlocks
from offramp.policies.decoding import Verify
from offramp.train.recipe import Joint
from offramp.train.text_recipes import Mean

CARD = Card(
    name="sorted-llama",
    title="Sorted LLaMA: Unlocking the Potential of Intermediate Layers of Large Language Models for Dynamic Inference",
    authors="Parsa Kavehzadeh, Mojtaba Valipour, Marzieh Tahaei, Ali Ghodsi, Boxing Chen, Mehdi Rezagholizadeh",
    year=2024,
    venue="Findings of EACL",
    arxiv="2309.08968",
    engine="generate",
    delta_from="layerskip",
    delta={
        "axis": "sub-models of 12 to 36 of 40 blocks",
        "train": "plain mean of the sub-models' losses",
        "draft": "the smallest sub-model, four drafts",
    },
    lossless=True,
    trained=True,
    status="sketch",
    claim="The first half of the blocks, trained as a sub-model, has a perplexity within 5 % of the full model's trained alone.",
    predicate=Predicate("perplexity_ratio", "<=", 1.05, budget=0.5),
    bibtex="""
        @inproceedings{kavehzadeh2024sorted,
          title     = {Sorted {LLaMA}: Unlocking the Potential of Intermediate Layers of Large Language Models for Dynamic Inference},
          author    = {Kavehzadeh, Parsa and Valipour, Mojtaba and Tahaei, Marzieh and Ghodsi, Ali and Chen, Boxing and Rezagholizadeh, Mehdi},
          booktitle = {Findings of the Association for Computational Linguistics: EACL 2024},
          year      = {2024},
          eprint    = {2309.08968},
          archiveprefix = {arXiv}
        }
    """,  # noqa: E501
)


def sorted_llama(shares: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), draft_length: int = 4) -> System:
    """Compose Sorted LLaMA.

    Args:
        shares: of the blocks that the sub-models have, each inside (0, 1); paper 12, 16, ..., 36 of 40, the full model besides.
        draft_length: drafts in a round, at least 1.
    """
    return System(
        card=CARD,
        head=Shared(),
        placement=AfterBlocks(tuple(shares)),
        recipe=Joint(Mean()),
        draft=Verify(draft_length),
    )
