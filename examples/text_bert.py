"""Text: exits on a BERT, inputs with a mask and of any length. The weights are random here, so that nothing is downloaded;
`BertForSequenceClassification.from_pretrained(...)` takes the same path."""

import torch
from transformers import BertConfig, BertForSequenceClassification

import offramp

torch.manual_seed(0)
config = BertConfig(vocab_size=200, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, num_labels=2)
model = BertForSequenceClassification(config).eval()


def batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Token ids of which the last few are padding; label 1 if token 7 occurs more often than token 8."""
    ids = torch.randint(5, 15, (rows, length))
    mask = torch.ones_like(ids)
    mask[:, length - 3 :] = (torch.rand(rows, 3) < 0.5).long().sort(dim=1, descending=True).values
    ids = ids * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ((ids == 7).sum(1) > (ids == 8).sum(1)).long()}


example = batch(2, 12)
example.pop("labels")
net = offramp.attach(model, at=["bert.encoder.layer.0", "bert.encoder.layer.1", "bert.encoder.layer.2"], example=example)
offramp.fit(net, [batch(64, 12) for _ in range(40)], epochs=4, optimizer=lambda weights: torch.optim.AdamW(weights, 2e-3), progress=False)
trace = offramp.record(net, [batch(200, 12) for _ in range(5)], progress=False)
print("accuracy of each exit:", [round(float(a), 3) for a in 1 - trace.losses.mean(0)])

# Patience: leave once consecutive exits agree. Its state per input is compacted with the batch.
plan = offramp.calibrate(trace, offramp.Patience(), offramp.MeanCost(0.8))
print(plan)
run = offramp.compile(net, plan, measure=False)
for length in (12, 20):  # a length that was never seen
    inputs = batch(32, length)
    labels = inputs.pop("labels")
    answers = run(**inputs)
    accuracy, exits = (answers.output.argmax(1) == labels).float().mean(), torch.bincount(answers.exit, minlength=4).tolist()
    print(f"length {length}: accuracy {accuracy:.2f}, exits {exits}")
