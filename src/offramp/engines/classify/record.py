"""Record: run every exit on every item once and write what calibration needs."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from offramp.core.batches import unpack_batch
from offramp.core.errors import InvalidInput
from offramp.core.modes import evaluating
from offramp.core.parts import part_key
from offramp.core.protocols import Rule
from offramp.core.trace import LatencyTable, Trace
from offramp.core.types import Readout
from offramp.engines.classify.stages import placed
from offramp.network import Example, MultiExit

Loss = Callable[[Tensor, Tensor], Tensor]


def zero_one(logits: Tensor, labels: Tensor) -> Tensor:
    """0/1 error ``[B]`` of ``logits [B, C]`` against class indices ``[B]``.

    Raises:
        InvalidInput: an answer is one number, or the labels are not one class index per row.
    """
    if logits.shape[-1] < 2 or labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise InvalidInput(
            f"The 0/1 error compares class indices: it was given answers {tuple(logits.shape)} and labels {tuple(labels.shape)} of "
            f"{labels.dtype}; expected [B, 2 or more] and [B] of integers. Otherwise pass record(..., loss=...) with values in [0, 1]."
        )
    return (logits.argmax(dim=-1) != labels).float()


def _batches(loader: Iterable[Any]) -> int | None:
    """How many batches there will be, if the loader knows. A DataLoader of an iterable data set has a length that raises."""
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:
        return None


def record(
    net: MultiExit,
    loader: Iterable[Any],
    *,
    rules: Sequence[Rule] = (),
    keep_logits: bool = True,
    loss: Loss = zero_one,
    latency: LatencyTable | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Trace:
    """Run every exit of ``net`` on every batch of ``loader``.

    Args:
        net: network with exits; put in evaluation mode for the time being.
        loader: batches ``(inputs, labels)``, ``(inputs,)``, a tensor, or a mapping with the labels under ``labels`` or ``label``.
            A mapping that has no labels gives a trace without losses.
        rules: rules whose scores to record. Needed for rules that read hidden states; others can be scored later from logits.
        keep_logits: keep ``[N, K, C]`` logits (float32) in the trace.
        loss: ``(logits [B, C], labels [B]) -> [B]`` in [0, 1].
        latency: measured times to carry along (from an engine's warm-up).
        provenance: facts about the data to keep (name, split, hash).
        progress: show a progress bar.

    Returns:
        A replayable trace on the CPU.

    Raises:
        InvalidInput: the loader is empty, an exit gives non-finite logits, or a loss leaves [0, 1].
    """
    columns: dict[str, list[Tensor]] = {}
    seen = 0
    on_device = [placed(rule, net.device) for rule in rules]
    with torch.inference_mode(), evaluating(net), Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("recording", total=_batches(loader))
        for batch in loader:
            args, kwargs, labels = unpack_batch(batch)
            args, kwargs = Example(args, kwargs).to(net.device, net.dtype)
            logits, states = net.forward_with_states(*args, **kwargs)
            stacked = torch.stack([z.float() for z in logits], dim=1)
            if not torch.isfinite(stacked).all():
                rows, exits, _ = torch.nonzero(~torch.isfinite(stacked), as_tuple=True)
                raise InvalidInput(
                    f"Exit {net.names[int(exits[0])]!r} gives non-finite logits for item {seen + int(rows[0])}. Check the weights, or "
                    "record in float32."
                )
            found = {"predictions": _predict(stacked)}
            if keep_logits:
                found["logits"] = stacked
            if labels is not None:
                labels = labels.to(stacked.device)
                found["labels"] = labels
                found["losses"] = torch.stack([loss(stacked[:, k], labels) for k in range(stacked.shape[1])], dim=1).float()
            for index, rule in enumerate(on_device):
                found[f"rule{index}"] = _score(rule, logits, states)
            for name, value in found.items():
                columns.setdefault(name, []).append(value.cpu())
            seen += stacked.shape[0]
            bar.advance(task)
    if not seen:
        raise InvalidInput("The loader gave no batch, so there is nothing to record.")
    joined = {name: torch.cat(parts) for name, parts in columns.items()}
    for name in ("labels", "losses"):
        if name in joined and joined[name].shape[0] != seen:
            raise InvalidInput(f"Only {joined[name].shape[0]} of {seen} items have labels; give labels for all or for none.")
    losses = joined.get("losses")
    if losses is not None and not ((losses >= 0) & (losses <= 1)).all():
        raise InvalidInput(f"The loss must lie in [0, 1], got {float(losses.min()):.3g} to {float(losses.max()):.3g}. Scale or clip it.")
    cost, base = net.costs()
    return Trace(
        exits=net.names,
        predictions=joined["predictions"],
        cost=cost,
        base_cost=base,
        losses=losses,
        labels=joined.get("labels"),
        logits=joined.get("logits"),
        recorded={part_key(rule): joined[f"rule{i}"] for i, rule in enumerate(rules)},
        latency=latency,
        fingerprint=net.fingerprint(),
        head_cost=net.head_costs(),
        provenance={
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name(net.device) if net.device.type == "cuda" else platform.processor() or platform.machine(),
            "dtype": str(net.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            **(provenance or {}),
        },
    )


def _predict(logits: Tensor) -> Tensor:
    """Class index, or the value itself where an answer is one number."""
    return logits.argmax(dim=-1) if logits.shape[-1] > 1 else logits[..., 0]


def _score(rule: Rule, logits: Sequence[Tensor], states: Sequence[Tensor]) -> Tensor:
    rows = logits[0].shape[0]
    scores = torch.zeros(rows, len(logits), device=logits[0].device)
    state = rule.begin(rows, logits[0].device)
    for k, hidden in enumerate(states):
        scores[:, k], state = rule.score(k, Readout(logits[k], hidden), state)
    return scores
