"""Exits of denoisers: an output layer for the image, and an estimate of how wrong it is that knows the noise level.

Built for one place of a denoiser (`offramp.diffusion`), which calls them as ``output(hidden, log_snr)`` and
``uncertainty(hidden, log_snr)``. Tokens and maps are read alike: a map is its positions as tokens.

Shapes: ``B`` rows, ``T`` tokens, ``D`` width of the state, ``C, H, W`` the model's output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.core.errors import InvalidInput

LEVEL_FEATURES = 32
"""Sines and cosines that stand for a noise level."""

_SLOWEST, _FASTEST = 0.05, 2.0  # radians per unit of log-SNR: one slow turn over all of [-20, 20], and details of about one unit


@dataclass(frozen=True)
class DenoisingExit:
    """An exit of a denoiser, as data: what DeeDiff adds after every block (Tang et al. 2023, section 3.2).

    Attributes:
        output: an output layer: layer norm, a linear map from each token to its patch, and a 3x3 convolution over the image. Without it
            the exit's image is that of the model's own final layers.
        uncertainty: one linear map on ``[state; noise level]`` of each token, a sigmoid, and the mean over tokens.
        convolution: whether the output layer ends with the convolution, which evens out the borders of patches.
        modulated: whether the noise level scales and shifts what is normalised, as in a diffusion transformer's own final layer. The paper
            has no such thing.
    """

    output: bool = True
    uncertainty: bool = True
    convolution: bool = True
    modulated: bool = False

    def __post_init__(self) -> None:
        if not (self.output or self.uncertainty):
            raise InvalidInput("A DenoisingExit needs an output layer, an uncertainty or both; got neither.")

    def build(self, hidden_shape: tuple[int, ...], output_shape: tuple[int, ...], predicted: int | None = None) -> DenoisingHead:
        """Make the module.

        Args:
            hidden_shape: of the state per row: tokens ``(T, D)`` or a map ``(D, H', W')``.
            output_shape: of the model's output per row: ``(C, H, W)``, or ``(T, E)`` for a model of tokens.
            predicted: how many of C are the prediction; by default all. The others are a learned variance, in which an exit answers 0: the
                geometric mean of the two bounds between which it lies (Nichol and Dhariwal 2021, equation 15, as DiT's output v is scaled).

        Raises:
            InvalidInput: the output cannot be made of patches of the state.
        """
        if not isinstance(output_shape, tuple):
            raise InvalidInput(
                "DenoisingExit is an exit of a denoiser: attach_denoiser(...), then offramp.train.add_heads(net, DenoisingExit())."
            )
        return DenoisingHead(self, tuple(hidden_shape), output_shape, predicted)


class DenoisingHead(nn.Module):
    """Module of `DenoisingExit`.

    Attributes:
        spec: what it was built from.
        hidden_shape: of the state per row.
        output_shape: of the model's output per row.
        predicted: how many of its channels the output layer makes; the others are 0.
    """

    def __init__(
        self, spec: DenoisingExit, hidden_shape: tuple[int, ...], output_shape: tuple[int, ...], predicted: int | None = None
    ) -> None:
        super().__init__()
        if len(hidden_shape) not in (2, 3):
            raise InvalidInput(f"A denoising exit reads tokens (T, D) or a map (D, H, W) per row; this state is {hidden_shape}.")
        self.spec, self.hidden_shape, self.output_shape = spec, hidden_shape, output_shape
        self.predicted = output_shape[0] if predicted is None or len(output_shape) != 3 else predicted
        if not 1 <= self.predicted <= output_shape[0]:
            raise InvalidInput(f"predicted must be from 1 to the {output_shape[0]} channels of the output, got {predicted}.")
        width = hidden_shape[1] if len(hidden_shape) == 2 else hidden_shape[0]
        tokens = hidden_shape[0] if len(hidden_shape) == 2 else hidden_shape[1] * hidden_shape[2]
        if spec.output:
            made_shape = (self.predicted, *output_shape[1:]) if len(output_shape) == 3 else output_shape
            self.patch, made = _patch(tokens, hidden_shape, made_shape)
            self.norm = nn.LayerNorm(width)
            self.linear = nn.Linear(width, made)
            channels = self.predicted
            smooth = spec.convolution and len(output_shape) == 3
            self.convolution = nn.Conv2d(channels, channels, 3, padding=1) if smooth else nn.Identity()
            if smooth:  # begins as the identity, so that an exit is not hurt by an untrained convolution
                nn.init.dirac_(self.convolution.weight)  # type: ignore[arg-type]
                nn.init.zeros_(self.convolution.bias)  # type: ignore[arg-type]
            if spec.modulated:
                self.modulation = nn.Linear(LEVEL_FEATURES, 2 * width)
                nn.init.zeros_(self.modulation.weight)
                nn.init.zeros_(self.modulation.bias)
        if spec.uncertainty:
            self.probe = nn.Linear(width + LEVEL_FEATURES, 1)
            nn.init.zeros_(self.probe.weight)  # states may be large: a random start would saturate the sigmoid
            nn.init.zeros_(self.probe.bias)
        # An exit says what it has by having it (`offramp.diffusion` looks for the methods).
        self.output = self._output if spec.output else None
        self.uncertainty = self._uncertainty if spec.uncertainty else None

    def _tokens(self, hidden: Tensor) -> Tensor:
        if tuple(hidden.shape[1:]) != self.hidden_shape:
            raise InvalidInput(f"This exit was built for a state {self.hidden_shape} per row and was given {tuple(hidden.shape[1:])}.")
        return hidden if hidden.ndim == 3 else hidden.flatten(2).transpose(1, 2)

    def _output(self, hidden: Tensor, log_snr: Tensor) -> Tensor:
        """The exit's answer ``[B, C, H, W]`` at noise levels ``[B]``, 0 in channels that are no prediction."""
        tokens = self.norm(self._tokens(hidden))
        if self.spec.modulated:
            scale, shift = self.modulation(level_features(log_snr, tokens.dtype))[:, None].chunk(2, -1)
            tokens = tokens * (1 + scale) + shift
        values = self.linear(tokens)
        if len(self.output_shape) == 2:
            return values
        _, height, width = self.output_shape
        rows, columns = height // self.patch, width // self.patch
        grid = values[:, values.shape[1] - rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))  # conditioning tokens come first
        answer: Tensor = self.convolution(F.pixel_shuffle(grid, self.patch))
        return answer if self.predicted == self.output_shape[0] else F.pad(answer, (0, 0, 0, 0, 0, self.output_shape[0] - self.predicted))

    def _uncertainty(self, hidden: Tensor, log_snr: Tensor) -> Tensor:
        """Mean over tokens of what the error is expected to be, ``[B]`` in [0, 1]."""
        tokens = self._tokens(hidden)
        # One linear map of [state; level], without writing the level out for every token.
        of_state, of_level = self.probe.weight.split((tokens.shape[-1], LEVEL_FEATURES), dim=1)
        level = F.linear(level_features(log_snr, tokens.dtype), of_level, self.probe.bias)
        return torch.sigmoid(F.linear(tokens, of_state).squeeze(-1) + level).mean(1)


def level_features(log_snr: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sines and cosines ``[B, LEVEL_FEATURES]`` of log-SNRs ``[B]``."""
    half = LEVEL_FEATURES // 2
    steps = torch.arange(half, device=log_snr.device, dtype=torch.float32) / (half - 1)
    angles = log_snr.float()[:, None] * (_SLOWEST * torch.exp(steps * math.log(_FASTEST / _SLOWEST)))
    return torch.cat([angles.sin(), angles.cos()], 1).to(dtype)


def _patch(tokens: int, hidden: tuple[int, ...], output: tuple[int, ...]) -> tuple[int, int]:
    """Side of the patch that a token stands for, and values of it."""
    if len(output) == 2:
        if len(hidden) == 2 and output[0] == tokens:
            return 1, output[1]
    elif len(output) == 3:
        channels, height, width = output
        for side in range(1, min(height, width) + 1):
            if height % side or width % side:
                continue
            rows, columns = height // side, width // side
            fits = (rows, columns) == hidden[1:] if len(hidden) == 3 else rows * columns <= tokens
            if fits:
                return side, channels * side * side
    raise InvalidInput(
        f"An output layer from a state {hidden} to {output} is not known: each token or place must stand for a square patch of the image."
    )


DENOISING_PARTS: dict[str, type] = {"DenoisingExit": DenoisingExit}
"""Exits of denoisers by name: what a saved file may name. Apart from the others, as they are sized to an image and not to classes."""

__all__ = ["DENOISING_PARTS", "LEVEL_FEATURES", "DenoisingExit", "DenoisingHead", "level_features"]
