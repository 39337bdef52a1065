"""Resumable execution: the cut (any exportable model), taps (hooks for training and recording) and where exits can go."""

from offramp.backbones.cut import Cut, CutState, LiveTensor, Segment, cut
from offramp.backbones.placement import Block, repeated_blocks
from offramp.backbones.taps import Taps

__all__ = ["Block", "Cut", "CutState", "LiveTensor", "Segment", "Taps", "cut", "repeated_blocks"]
