"""Only as much compute as each input needs: exits for a trained PyTorch network, a budget or a guarantee, and engines that save the time.

::

    net = offramp.attach(model, at=["blocks.3", "blocks.7"], example=images)
    offramp.fit(net, train_loader, epochs=10)
    trace = offramp.record(net, calibration_loader)
    plan = offramp.calibrate(trace, offramp.Confidence(), offramp.MeanCost(0.5))
    run = offramp.compile(net, plan)
    answers = run(batch)

A causal language model takes the same verbs::

    lm = offramp.attach(AutoModelForCausalLM.from_pretrained(path), exits=[4], head="norm")
    offramp.fit(lm, texts, tokenizer=tokenizer, epochs=1)
    writer = offramp.compile(lm, offramp.Verify(draft_length=4), tokenizer=tokenizer)
    written = writer.generate(prompts, max_new_tokens=100)

So does a pipeline of diffusers::

    fast = offramp.attach(DiTPipeline.from_pretrained(path), system=offramp.systems.build("deepcache"))
    plan = offramp.calibrate(fast, offramp.MeanCost(0.6), calls=[{"class_labels": [1, 2, 3]}])
    images = offramp.compile(fast, plan)(class_labels=[4, 5], num_inference_steps=50).images

Verbs, the rules and targets most people need, and the engines' modes are here; every other part is in its folder: `offramp.exits`,
`offramp.policies`, `offramp.budget`, `offramp.train`, `offramp.engines`, `offramp.measure`, `offramp.systems`.
"""

from offramp import systems
from offramp.budget import Latency, MeanCost, PeakCost, Risk
from offramp.core.certificate import Plan
from offramp.core.errors import OfframpError
from offramp.core.trace import Trace
from offramp.engines.classify.engine import Latency as LatencyMode
from offramp.engines.classify.engine import Quota as QuotaMode
from offramp.engines.classify.engine import Throughput as ThroughputMode
from offramp.engines.export import export_onnx
from offramp.engines.text.draft_export import export_draft
from offramp.language import LanguageModel
from offramp.network import MultiExit
from offramp.policies import Confidence, Entropy, Patience
from offramp.policies.decoding import Accept, Plain, Verify
from offramp.verbs import attach, calibrate, compile, fit, load, load_plan, record, report  # noqa: A004 - the verb, as in torch.compile

__version__ = "0.1.0.dev0"

__all__ = [
    "Accept",
    "Confidence",
    "Entropy",
    "LanguageModel",
    "Latency",
    "LatencyMode",
    "MeanCost",
    "MultiExit",
    "OfframpError",
    "Patience",
    "PeakCost",
    "Plain",
    "Plan",
    "QuotaMode",
    "Risk",
    "ThroughputMode",
    "Trace",
    "Verify",
    "attach",
    "calibrate",
    "compile",
    "export_draft",
    "export_onnx",
    "fit",
    "load",
    "load_plan",
    "record",
    "report",
    "systems",
]
