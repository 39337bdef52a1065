"""Rules that compare an exit with the exit before it: answers that agree, outputs or states that have stopped changing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from offramp.core.errors import InvalidInput
from offramp.core.types import Readout, RuleState
from offramp.policies.base import ReadsState, Remembers, constant, read_hidden
from offramp.policies.scores import NEVER, as_values


@dataclass(frozen=True)
class Patience(Remembers):
    """How many exits in a row, this one included, gave the answer of the exit before them; 0 after a change and at the first exit.

    PABEE (Zhou et al. 2020, "BERT Loses Patience", section 3.2): a threshold of P is the paper's patience P.

    Attributes:
        regression_tolerance: answers are numbers and agree if none moves by this much or more (the paper's code: 0.1);
            ``None`` for classes, which agree if the largest logit is the same one.
    """

    regression_tolerance: float | None = None

    def __post_init__(self) -> None:
        if self.regression_tolerance is not None and not self.regression_tolerance > 0:
            raise InvalidInput(f"regression_tolerance must be positive or None, got {self.regression_tolerance}.")

    def begin(self, rows: int, device: torch.device) -> RuleState:
        return {"count": torch.zeros(rows, device=device)}

    def score(self, exit_index: int, readout: Readout, state: RuleState) -> tuple[Tensor, RuleState]:
        if self.regression_tolerance is not None:
            answer = as_values(readout.logits)
        elif readout.logits.ndim >= 2 and readout.logits.shape[-1] >= 2:
            answer = readout.logits.argmax(dim=-1, keepdim=True).flatten(1)
        else:
            raise InvalidInput(
                f"Patience compares classes, and this answer {tuple(readout.logits.shape)} has one value per row. "
                "Use Patience(regression_tolerance=0.1) for regression."
            )
        if "answer" not in state:  # the first exit; the answer's width is not known before
            return state["count"], {"count": state["count"], "answer": answer}
        if self.regression_tolerance is None:
            same = (answer == state["answer"]).all(dim=-1)
        else:
            same = ((answer - state["answer"]).abs() < self.regression_tolerance).all(dim=-1)
        count = torch.where(same, state["count"] + 1, 0.0)
        return count, {"count": count, "answer": answer}


@dataclass(frozen=True)
class OutputStability(Remembers):
    """Minus how far the output moved since the exit before: for regression, actions and images. `NEVER` at the first exit.

    DeeR-VLA (Yue et al. 2024, section 3.2), which leaves when the action moves by at most a threshold. The answer is read as one
    vector per row.

    Attributes:
        euclidean: Euclidean distance; otherwise the largest change of any component.
    """

    euclidean: bool = False

    def score(self, exit_index: int, readout: Readout, state: RuleState) -> tuple[Tensor, RuleState]:
        value = as_values(readout.logits).contiguous()
        if "value" not in state:
            return constant(NEVER, readout), {"value": value}
        change = (value - state["value"]).abs()
        moved = change.square().sum(dim=-1).sqrt() if self.euclidean else change.amax(dim=-1)
        return -moved, {"value": value}


@dataclass(frozen=True)
class StateSimilarity(Remembers, ReadsState):
    """Cosine of the states at this exit and the one before, in [-1, 1]. `NEVER` at the first exit.

    A saturated state changes little in deeper layers: CALM (Schuster et al. 2022, section 3.5), MuE (Tang et al. 2023). Needs no
    training and no head.

    Attributes:
        token: token that stands for a sequence ``[B, T, D]``, the first by default; ``None`` = the mean, not for padded batches.
            Maps are averaged over positions.
    """

    token: int | None = 0

    @property
    def bounds(self) -> tuple[float, float]:
        return (-1.0, 1.0)

    def score(self, exit_index: int, readout: Readout, state: RuleState) -> tuple[Tensor, RuleState]:
        vector = read_hidden(readout, self.token, self).float()
        if "vector" not in state:
            return constant(NEVER, readout), {"vector": vector}
        before = state["vector"]
        if before.shape[-1] != vector.shape[-1]:
            raise InvalidInput(
                f"StateSimilarity compares states of the same width; exit {exit_index} has {vector.shape[-1]} channels and the exit "
                f"before it {before.shape[-1]}. Place the exits within one stage, or use OutputStability() or HaltingCDF."
            )
        return F.cosine_similarity(vector, before, dim=-1).clamp(-1.0, 1.0), {"vector": vector}
