"""Small language models trained on real text on the spot: settings, text as tokens, and models without exits, each trained once."""

from __future__ import annotations

import copy
import lzma
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from offramp.backbones.decoder import decoder
from offramp.cli.progress import Say
from offramp.cli.records import optional
from offramp.cli.reproduce import warmup_cosine
from offramp.cli.reproduce_common import VariantSettings
from offramp.core.errors import InvalidInput
from offramp.language import LanguageModel, attach_lm
from offramp.train.loop import fit
from offramp.train.recipe import FinalOnly, Joint, Recipe
from offramp.train.text import texts_in


@dataclass(frozen=True)
class TextSettings(VariantSettings):
    """One variant of a reproduction of a language-model system.

    Attributes:
        blocks: of the full model, a Llama.
        width: of its states.
        heads: of attention.
        smaller: blocks of the smaller static models.
        steps: of training the full model and each smaller one.
        exit_steps: of the system's recipe, and of the full model's further training where that is the comparison.
        train: the text: a file (``.txt``, ``.txt.xz``) or a folder of them; ``{data}`` stands for the path given on the command line.
        held_out: another; its first half calibrates and its second tests. ``""`` = the last tenth of ``train``.
        vocabulary: tokens of a byte-pair encoding made from the text; 0 = its characters.
        length: tokens of a text in training.
        batch_size: texts in a step.
        learning_rate: highest, of AdamW, when training from random weights; see `offramp.cli.reproduce.warmup_cosine`.
        exit_learning_rate: of what the recipe trains.
        prompts: texts that are continued.
        prompt_length: tokens of each.
        new_tokens: that are written.
        calibration_prompts: texts to choose thresholds on.
        thresholds: how many are tried where each is run.
        timed: of the prompts, for the clock.
        rounds: of the clock, after one to warm up.
        evaluated: held-out texts for perplexities.
        mixed_precision: of training on a CUDA device. A CPU trains, and every device measures, in float32.
        sweep: arguments of the system's builder, each with values to try in turn: one row each.
    """

    blocks: int
    width: int
    heads: int
    smaller: tuple[int, ...]
    steps: int
    exit_steps: int
    train: str = "{data}"
    held_out: str = ""
    vocabulary: int = 0
    length: int = 64
    batch_size: int = 32
    learning_rate: float = 3e-3
    exit_learning_rate: float = 1e-3
    prompts: int = 12
    prompt_length: int = 32
    new_tokens: int = 48
    calibration_prompts: int = 96
    thresholds: int = 8
    timed: int = 4
    rounds: int = 5
    evaluated: int = 256
    mixed_precision: str = "bf16"
    sweep: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks < 2 or not self.smaller or not all(0 < s < self.blocks for s in self.smaller):
            raise InvalidInput(f"smaller must list numbers of blocks below blocks={self.blocks}, got {list(self.smaller)}.")
        counts = (self.steps, self.exit_steps, self.prompts, self.calibration_prompts, self.timed, self.rounds, self.evaluated)
        if min(counts) < 1 or self.new_tokens < 2 or self.thresholds < 2 or self.length < 2:
            raise InvalidInput("steps, prompts, timed, rounds and evaluated must be at least 1, new_tokens, thresholds and length 2.")


# ---- text ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Text as tokens, int64 each.

    Attributes:
        train: to learn from.
        calibration: held out, to choose thresholds on.
        test: held out, to measure on.
        vocabulary: how many different tokens there are.
    """

    train: Tensor
    calibration: Tensor
    test: Tensor
    vocabulary: int


def read_text(path: Path) -> str:
    """A file, plain or compressed by xz, or all ``.txt`` files of a folder.

    Raises:
        InvalidInput: there is none.
    """
    if path.is_dir():
        return "\n".join(texts_in(path))
    if not path.is_file():
        raise InvalidInput(f"There is no text at {path}; give a .txt or .txt.xz file, or a folder of .txt files, with --data.")
    if path.suffix == ".xz":
        with lzma.open(path, "rt", encoding="utf-8") as file:
            return file.read()
    return path.read_text(encoding="utf-8")


def load_corpus(settings: TextSettings, data: str | None) -> Corpus:
    """Read and encode the text of a variant."""
    if "{data}" in settings.train + settings.held_out and data is None:
        raise InvalidInput("This variant reads text from a path: give it with --data.")
    text = read_text(Path(settings.train.format(data=data)))
    held = read_text(Path(settings.held_out.format(data=data))) if settings.held_out else ""
    if settings.vocabulary:
        encode, size = _byte_pairs(text, settings.vocabulary)
    else:
        characters = {c: i for i, c in enumerate(sorted(set(text + held)))}
        encode, size = lambda t: [characters[c] for c in t], len(characters)
    tokens = torch.tensor(encode(text))
    cut = len(tokens) if held else len(tokens) - len(tokens) // 10
    rest = torch.tensor(encode(held)) if held else tokens[cut:]
    half = len(rest) // 2
    if half < settings.length * 4 or cut < settings.length * 4:
        raise InvalidInput(f"The text has {cut} tokens to learn from and {len(rest)} held out, too few for texts of {settings.length}.")
    return Corpus(tokens[:cut], rest[:half], rest[half:], size)


def _byte_pairs(text: str, vocabulary: int) -> tuple[Callable[[str], list[int]], int]:
    tokenizers = optional("tokenizers", "hf", "A byte-pair encoding")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(text.splitlines(True), tokenizers.trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet))
    return (lambda t: made.encode(t).ids), made.get_vocab_size()


class _Windows(Dataset[dict[str, Tensor]]):
    """``count`` texts of ``length`` tokens from random places of a stream."""

    def __init__(self, stream: Tensor, count: int, length: int, seed: int) -> None:
        self.stream, self.length = stream, length
        self.starts = torch.randint(0, len(stream) - length + 1, (count,), generator=torch.Generator().manual_seed(seed)).tolist()

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self.stream[self.starts[index] : self.starts[index] + self.length]
        return {"input_ids": tokens, "labels": tokens}


def windows(stream: Tensor, count: int, length: int, seed: int) -> Tensor:
    """Some texts ``[count, length]`` from random places of a stream."""
    items = _Windows(stream, count, length, seed)
    return torch.stack([items[i]["input_ids"] for i in range(count)])


# ---- training ------------------------------------------------------------------------------------------------------------


def make_model(settings: TextSettings, vocabulary: int, blocks: int, seed: int, device: str) -> nn.Module:
    """A Llama with random weights."""
    transformers = optional("transformers", "hf", "Reproducing a language-model system")
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=settings.width,
        intermediate_size=max(16, settings.width * 8 // 3 // 16 * 16),
        num_hidden_layers=blocks,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=max(settings.length, settings.prompt_length + settings.new_tokens) + 64,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    made: nn.Module = transformers.LlamaForCausalLM(config).to(device).eval()
    return made


def train(
    settings: TextSettings, corpus: Corpus, lm: LanguageModel, recipe: Recipe, steps: int, rate: float, seed: int, device: str
) -> None:
    """Some steps of a recipe on random texts."""
    items = _Windows(corpus.train, steps * settings.batch_size, settings.length, seed)
    fit(
        lm,
        DataLoader(items, batch_size=settings.batch_size),
        recipe,
        epochs=1,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, rate, weight_decay=0.01),
        scheduler=warmup_cosine,
        max_grad_norm=1.0,
        mixed_precision=settings.mixed_precision if device.startswith("cuda") else None,
        seed=seed,
        progress=False,
    )
    lm.model.to(device).eval()
    lm.to(device).eval()


class Bases:
    """Models trained without exits, each once: what several systems start from and are compared with.

    Args:
        say: told what is being trained.
    """

    def __init__(self, say: Say = lambda text: None) -> None:
        self.say = say
        self._made: dict[Any, nn.Module] = {}

    def get(self, settings: TextSettings, corpus: Corpus, seed: int, device: str, blocks: int, further: int = 0) -> nn.Module:
        """A trained model, to be left as it is.

        Args:
            settings: of the variant; of the system, they may be of any.
            corpus: its text.
            seed: of weights and training.
            device: where.
            blocks: how many.
            further: steps of training after the first, by the exits' rate.
        """
        plain_settings = replace(settings, system={}, sweep={}, seeds=(0,))
        key = (repr(plain_settings), seed, device, blocks, further)
        if key not in self._made:
            self.say(f"seed {seed}: {blocks} blocks without exits" + (f", {further} steps more" if further else ""))
            if further:
                model = copy.deepcopy(self.get(settings, corpus, seed, device, blocks))
                steps, rate, order = further, settings.exit_learning_rate, seed + 1000
            else:
                model = make_model(settings, corpus.vocabulary, blocks, seed, device)
                steps, rate, order = settings.steps, settings.learning_rate, seed
            train(settings, corpus, attach_lm(model, [1]) if blocks > 1 else bare(model), Joint(FinalOnly()), steps, rate, order, device)
            self._made[key] = model
        return self._made[key]


def bare(model: nn.Module) -> LanguageModel:
    """A model without exits, of any number of blocks."""
    return LanguageModel(decoder(model), (), ())
