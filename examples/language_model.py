"""A language model that writes the same text in fewer passes: an exit after the first block drafts, the whole model verifies. The model
is small and trained here, on sums in words, as nothing is downloaded; `AutoModelForCausalLM.from_pretrained(...)` goes the same way."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import offramp
from offramp.train import Joint

torch.manual_seed(0)
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen"]
LINES = [f"{NAMES[a]} and {NAMES[b]} make {NAMES[a + b]}.\n" for a in range(10) for b in range(min(10, 15 - a))]
order = torch.randperm(1500) % len(LINES)
text = "".join(LINES[i] for i in order)


def tokens(text: str) -> list[int]:
    """A token a byte; a tokenizer of transformers would do the same for a real model."""
    return list(text.encode())


config = LlamaConfig(
    vocab_size=128, hidden_size=48, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, bos_token_id=None, eos_token_id=None
)
model = LlamaForCausalLM(config)

# One exit after the first block: a norm of its own before the model's output layer. Model and exit are trained together here; with a
# model that is trained already, `offramp.fit(lm, text, epochs=1)` leaves it as it is and teaches the exit to say what it says.
lm = offramp.attach(model, exits=[1], head="norm")
offramp.fit(
    lm, [text], Joint(), tokenizer=tokens, block=96, batch_size=16, epochs=2, progress=False,
    optimizer=lambda weights: torch.optim.AdamW(weights, 6e-3),
)  # fmt: skip

prompts = [tokens("two and "), tokens("seven and five "), tokens("nine")]
plain = offramp.compile(lm, offramp.Plain()).generate(prompts, max_new_tokens=48)
drafted = offramp.compile(lm, offramp.Verify(draft_length=4)).generate(prompts, max_new_tokens=48)
print(bytes(plain.tokens[1]).decode().splitlines()[0])
print(f"same text: {plain.tokens == drafted.tokens}, drafts kept: {drafted.acceptance:.2f}")
print(f"passes over all blocks: {drafted.deep_passes} in place of {plain.deep_passes}")

# Whether that is faster here is measured: the planner times rounds on this machine and turns drafts off where they would not pay.
written = [p + t for p, t in zip(prompts, plain.tokens, strict=True)]
run = offramp.compile(lm, texts=written, starts=[len(p) for p in prompts])
print(run.plan)
print(f"as planned, same text: {run.generate(prompts, max_new_tokens=48).tokens == plain.tokens}")

# A text that may differ: tokens leave at the exit when it is sure enough, and what the model would have said is learned on the way.
sure = offramp.compile(lm, offramp.Accept(0.9)).generate(prompts, max_new_tokens=48)
print(f"left early: {sure.audited}, of those the model would have written otherwise: {sure.disagreed}")

# Exits are saved without the model, and the draft as a checkpoint that transformers takes as `assistant_model=`.
lm.save("exits")
again = offramp.load(model, "exits")
draft = offramp.export_draft(again, "draft")
print(f"saved: exits after {again.exits} blocks, a draft of {draft.parameters:,} parameters")
