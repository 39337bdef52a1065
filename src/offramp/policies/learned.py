"""Rules with weights. Each is a module with a ``config``; recipes train them through the method named in its docstring.

Widths come from the exits: ``HaltingCDF.for_shapes([e.hidden_shape for e in net.exits])``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Self, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.core.errors import InvalidInput
from offramp.core.pooling import pooled_width
from offramp.core.types import Readout, RuleState
from offramp.policies.base import ReadsState, Remembers, RuleBase, at_exit, read_hidden
from offramp.policies.scores import uncertainty_features


@final
class LearnedGate(RuleBase, nn.Module):
    """A gate per exit on four uncertainty statistics of its answer: ``sigmoid(w . features + b)``, in [0, 1].

    JEI-DNN (Regol et al. 2024, "Jointly-Learned Exit and Inference", section 4). The statistics are detached, so gates do not
    train heads. Train on `logit`.

    Args:
        exits: early exits.
        conditional: the score is the paper's exit probability given that the row came here: ``P_k / (1 - sum_{j<k} P_j)`` with
            ``P_k = min(g_k, 1 - sum_{j<k} P_j)``; the paper leaves at 0.5. Otherwise the gate itself.
    """

    def __init__(self, exits: int, conditional: bool = False) -> None:
        super().__init__()
        if exits < 1:
            raise InvalidInput(f"exits must be at least 1, got {exits}.")
        self.config: Mapping[str, Any] = {"exits": exits, "conditional": conditional}
        self.conditional = conditional
        self.gates = nn.ModuleList(nn.Linear(4, 1) for _ in range(exits))

    @property
    def stateful(self) -> bool:
        return self.conditional

    @property
    def bounds(self) -> tuple[float, float]:
        return (0.0, 1.0)

    def begin(self, rows: int, device: torch.device) -> RuleState:
        return {"left": torch.zeros(rows, device=device)} if self.conditional else {}

    def logit(self, exit_index: int, readout: Readout) -> Tensor:
        """The gate before the sigmoid, ``[B]`` float32."""
        return _scalar(at_exit(list(self.gates), exit_index, self), uncertainty_features(readout.logits.detach()))

    def score(self, exit_index: int, readout: Readout, state: RuleState) -> tuple[Tensor, RuleState]:
        gate = torch.sigmoid(self.logit(exit_index, readout))
        if not self.conditional:
            return gate, state
        remaining = 1 - state["left"]
        leaves = torch.minimum(gate, remaining)
        # Where nothing remains the row has left with certainty already: 1, not 0 / 0.
        given = torch.where(remaining > 0, leaves / torch.where(remaining > 0, remaining, 1.0), 1.0)
        return given, {"left": state["left"] + leaves}


class _Probe(ReadsState, nn.Module):
    """One number per row from the pooled state at an exit: layer norm (a state's scale is free), linear or a small MLP.

    Args:
        widths: width of the pooled state at each early exit.
        inner: width of a hidden layer with GELU; 0 for none.
        shared: one probe for all exits, which must then have one width.
        token: which token stands for a sequence; ``None`` = the mean, not for padded batches.
    """

    def __init__(self, widths: Sequence[int], inner: int = 0, shared: bool = False, token: int | None = 0) -> None:
        super().__init__()
        self.widths = _check_widths(widths, shared, self)
        self.config: Mapping[str, Any] = {"widths": self.widths, "inner": inner, "shared": shared, "token": token}
        self.token = token
        self.probes = nn.ModuleList(_probe(w, inner, 1) for w in (self.widths[:1] if shared else self.widths))

    @classmethod
    def for_shapes(cls, shapes: Sequence[tuple[int, ...]], *, inner: int = 0, shared: bool = False) -> Self:
        """Made for states of these shapes (without the batch, ``-1`` = varies, as in ``Exit.hidden_shape``)."""
        return cls(_widths(shapes), inner, shared, _token(shapes))

    def _read(self, exit_index: int, readout: Readout) -> Tensor:
        vector = read_hidden(readout, self.token, self, at_exit(self.widths, exit_index, self))
        return _scalar(self.probes[exit_index if len(self.probes) > 1 else 0], vector)


@final
class StateGate(_Probe):
    """Probability that this exit's answer is right, learned from the state: ``sigmoid(w . h + b)``, in [0, 1].

    BERxiT's "learning to exit" (Xin et al. 2021, section 4.2) with ``shared=True``; its certainty is the score, its
    wrongness ``1 - score``. Made for regression too. Train on `logit`.
    """

    @property
    def bounds(self) -> tuple[float, float]:
        return (0.0, 1.0)

    def logit(self, exit_index: int, readout: Readout) -> Tensor:
        """The gate before the sigmoid, ``[B]`` float32."""
        return self._read(exit_index, readout)

    def score(self, exit_index: int, readout: Readout, state: RuleState) -> tuple[Tensor, RuleState]:
        return torch.sigmoid(self.logit(exit_index, readout)), state


@final
class PredictedUncertainty(_Probe):
    """Minus the loss of this exit's answer as predicted from the state; at most 0. For any task with a loss per item.

    After "Learning Loss for Active Learning" (Yoo and Kweon 2019, section 3), per exit. Train on `loss`.
    """

    def loss(self, exit_index: int, readout: Readout) -> Tensor:
        """Predicted loss ``[B]``, float32, not negative."""
        return F.softplus(self._read(exit_index, readout))

    def score(self, exit_index: int, readout: Readout, state: RuleState) -> tuple[Tensor, RuleState]:
        return -self.loss(exit_index, readout), state


@final
class HaltingCDF(Remembers, ReadsState, nn.Module):
    """Probability that a learned halting process has stopped by this exit: ``1 - prod_{j<=k} (1 - lambda_j)``, in [0, 1].

    PALBERT (Balagansky and Gavrilov 2022, "Teaching ALBERT to Ponder", section 3): a threshold of q is the paper's Q-exit, q = 0.5.
    ``x_k`` = tanh of a linear layer on the pooled state; ``lambda_k = sigmoid(MLP([x_k ; x_{k-1}]))``, ``x_{-1} = 0``, the MLP
    three times linear and tanh, then linear to one. Train on `halting` and `scores.halting_distribution`.

    Args:
        widths: width of the pooled state at each early exit.
        layers: hidden layers of the MLP.
        inner: width of a hidden layer; ``None`` = that of its input, as in the paper.
        shared: one MLP for all exits, which must then have one width.
        token: which token stands for a sequence; ``None`` = the mean, not for padded batches.
    """

    def __init__(
        self, widths: Sequence[int], layers: int = 3, inner: int | None = None, shared: bool = False, token: int | None = 0
    ) -> None:
        super().__init__()
        self.widths = _check_widths(widths, shared, self)
        if layers < 0 or (inner is not None and inner < 1):
            raise InvalidInput(f"HaltingCDF needs layers >= 0 and inner >= 1 or None, got layers={layers}, inner={inner}.")
        self.config: Mapping[str, Any] = {"widths": self.widths, "layers": layers, "inner": inner, "shared": shared, "token": token}
        self.token = token
        own = self.widths[:1] if shared else self.widths
        self.poolers = nn.ModuleList(nn.Linear(w, w) for w in own)
        self.lambdas = nn.ModuleList()
        for width, before in zip(own, (own[0], *own), strict=False):
            sizes = [width + before, *[width + before if inner is None else inner] * layers]
            body = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
            self.lambdas.append(nn.Sequential(*body, nn.Linear(sizes[-1], 1)))

    @classmethod
    def for_shapes(
        cls, shapes: Sequence[tuple[int, ...]], *, layers: int = 3, inner: int | None = None, shared: bool = False
    ) -> HaltingCDF:
        """Made for states of these shapes (without the batch, ``-1`` = varies, as in ``Exit.hidden_shape``)."""
        return cls(_widths(shapes), layers, inner, shared, _token(shapes))

    @property
    def bounds(self) -> tuple[float, float]:
        return (0.0, 1.0)

    def begin(self, rows: int, device: torch.device) -> RuleState:
        return {"survival": torch.ones(rows, device=device)}

    def halting(self, exit_index: int, readout: Readout, state: RuleState) -> tuple[Tensor, RuleState]:
        """``lambda_k`` ``[B]`` (float32) and the next state."""
        vector = read_hidden(readout, self.token, self, at_exit(self.widths, exit_index, self))
        index = exit_index if len(self.lambdas) > 1 else 0
        pooler = self.poolers[index]
        pooled = torch.tanh(_apply(pooler, vector))
        before = state["pooled"] if "pooled" in state else torch.zeros_like(pooled)
        chance = torch.sigmoid(_scalar(self.lambdas[index], torch.cat([pooled, before], dim=-1)))
        return chance, {"survival": state["survival"] * (1 - chance), "pooled": pooled}

    def score(self, exit_index: int, readout: Readout, state: RuleState) -> tuple[Tensor, RuleState]:
        _, state = self.halting(exit_index, readout, state)
        return 1 - state["survival"], state


@final
class Selector(Remembers, nn.Module):
    """Depth chosen up front: at the first exit a network gives a distribution over depths; the score at exit k is P(depth <= k).

    A threshold of 0.5 leaves at the median depth. Known before the rest runs, so batches can be formed by cost. Train on `depth_logits`
    (cross-entropy with the best exit; ECO-M2F, Yao et al. 2024, gate over depths).

    Args:
        exits: early exits K-1; depths are 0 to K-1, the last being the model's own output.
        width: of what is read: the pooled state at the first exit, or its logits.
        reads_logits: read the answer and not the state.
        inner: width of a hidden layer with GELU; 0 for none.
        token: which token stands for a sequence; ``None`` = the mean, not for padded batches.
    """

    def __init__(self, exits: int, width: int, reads_logits: bool = False, inner: int = 0, token: int | None = 0) -> None:
        super().__init__()
        if exits < 1:
            raise InvalidInput(f"exits must be at least 1, got {exits}.")
        _check_widths([width], False, self)
        self.config: Mapping[str, Any] = {"exits": exits, "width": width, "reads_logits": reads_logits, "inner": inner, "token": token}
        self.exits = exits
        self.width = width
        self.reads_logits = reads_logits
        self.token = token
        self.choose = _probe(width, inner, exits + 1)

    @classmethod
    def for_shapes(cls, shapes: Sequence[tuple[int, ...]], *, inner: int = 0) -> Selector:
        """Reads the state at the first of these exits (shapes without the batch, as in ``Exit.hidden_shape``)."""
        return cls(len(shapes), _widths(shapes)[0], False, inner, _token(shapes[:1]))

    @property
    def needs_hidden(self) -> bool:
        return not self.reads_logits

    @property
    def bounds(self) -> tuple[float, float]:
        return (0.0, 1.0)

    def begin(self, rows: int, device: torch.device) -> RuleState:
        return {"by_depth": torch.zeros(rows, self.exits + 1, device=device)}

    def depth_logits(self, readout: Readout) -> Tensor:
        """Logits ``[B, K]`` over depths, float32, from the first exit's readout."""
        if self.reads_logits:
            read = readout.logits.float()
            if read.ndim != 2 or read.shape[-1] != self.width:
                raise InvalidInput(
                    f"Selector was made for logits [rows, {self.width}] and was given {tuple(read.shape)}. "
                    "Make it with width=number of classes."
                )
        else:
            read = read_hidden(readout, self.token, self, self.width)
        return _apply(self.choose, read)

    def score(self, exit_index: int, readout: Readout, state: RuleState) -> tuple[Tensor, RuleState]:
        if exit_index == 0:
            by_depth = torch.softmax(self.depth_logits(readout), dim=-1).cumsum(dim=-1).clamp(max=1.0)
            state = {"by_depth": by_depth}
        elif exit_index >= self.exits:
            raise InvalidInput(f"Selector was made for {self.exits} early exits; exit {exit_index} was scored. Make it for all of them.")
        return state["by_depth"][:, exit_index], state


def _probe(width: int, inner: int, outputs: int) -> nn.Sequential:
    if inner < 0:
        raise InvalidInput(f"inner must be 0 (no hidden layer) or a width, got {inner}.")
    hidden: list[nn.Module] = [nn.Linear(width, inner), nn.GELU()] if inner else []
    return nn.Sequential(nn.LayerNorm(width), *hidden, nn.Linear(inner or width, outputs))


def _apply(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)`` in the module's precision, float32 out: a rule may keep float32 while the model runs in bfloat16, or follow it."""
    y: Tensor = module(x.to(next(module.parameters()).dtype))
    return y.float()


def _scalar(module: nn.Module, x: Tensor) -> Tensor:
    return _apply(module, x)[:, 0]


def _check_widths(widths: Sequence[int], shared: bool, rule: object) -> tuple[int, ...]:
    if not widths or any(w < 1 for w in widths):
        raise InvalidInput(
            f"{type(rule).__name__} needs the positive width of the state at each early exit, got {tuple(widths)}. Use for_shapes(...)."
        )
    if shared and len(set(widths)) > 1:
        raise InvalidInput(f"{type(rule).__name__}(shared=True) needs one width at all exits, got {tuple(widths)}. Use shared=False.")
    return tuple(widths)


def _widths(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    if not shapes:
        raise InvalidInput("No shapes were given: pass the hidden_shape of each early exit.")
    return tuple(pooled_width(tuple(s)) for s in shapes)


def _token(shapes: Sequence[tuple[int, ...]]) -> int | None:
    """The first token where a length varies, since padding would enter a mean; else the mean."""
    return 0 if any(len(s) == 2 and s[0] == -1 for s in shapes) else None


__all__ = ["HaltingCDF", "LearnedGate", "PredictedUncertainty", "Selector", "StateGate"]
