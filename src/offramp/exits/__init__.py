"""Heads and where they go, as data. A head is sized to the state it reads when the exits are attached."""

from offramp.exits.attention import AttentionHead
from offramp.exits.conv import ConvLocal, ConvPoolLinear
from offramp.exits.denoising import DENOISING_PARTS, DenoisingExit
from offramp.exits.linear import MLP, PooledLinear
from offramp.exits.placement import AfterBlocks, Evenly, EveryBlock, Fractions
from offramp.exits.pool import AutoPool, MeanPool, TokenPool
from offramp.exits.pooled import MixedPool, Pooler, tie
from offramp.exits.previous import Cascade, GeometricEnsemble

PARTS: dict[str, type] = {
    c.__name__: c
    for c in (
        *(AutoPool, MeanPool, TokenPool),
        *(PooledLinear, MLP, MixedPool, Pooler, ConvPoolLinear, ConvLocal, AttentionHead, Cascade, GeometricEnsemble),
        *(AfterBlocks, Evenly, EveryBlock, Fractions),
    )
}
"""Every part of this folder by name: what a saved file may name."""

__all__ = [*PARTS, "DENOISING_PARTS", "PARTS", "DenoisingExit", "tie"]
