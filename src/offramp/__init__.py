"""Only as much compute as each input needs: exits for a trained PyTorch network, a budget or a guarantee, and engines that save the time.

::

    net = offramp.attach(model, at=["blocks.3", "blocks.7"], example=images)
    offramp.fit(net, train_loader, epochs=10)
    trace = offramp.record(net, calibration_loader)
    plan = offramp.calibrate(trace, offramp.Confidence(), offramp.MeanCost(0.5))
    run = offramp.compile(net, plan)
    answers = run(batch)

Verbs, the rules and targets most people need, and the engine's modes are here; every other part is in its folder: `offramp.exits`,
`offramp.policies`, `offramp.budget`, `offramp.train`, `offramp.engines`, `offramp.measure`, `offramp.systems`.
"""

from offramp import systems
from offramp.budget import Latency, MeanCost, PeakCost, Risk, calibrate
from offramp.core.certificate import Plan
from offramp.core.errors import OfframpError
from offramp.core.trace import Trace
from offramp.engines.classify import Latency as LatencyMode
from offramp.engines.classify import Quota as QuotaMode
from offramp.engines.classify import Throughput as ThroughputMode
from offramp.engines.classify import compile  # noqa: A004 - the verb, as in torch.compile
from offramp.engines.export import export_onnx
from offramp.engines.record import record
from offramp.measure.report import report
from offramp.network import MultiExit, attach, load, load_plan
from offramp.policies import Confidence, Entropy, Patience
from offramp.train import fit

__version__ = "0.1.0.dev0"

__all__ = [
    "Confidence",
    "Entropy",
    "Latency",
    "LatencyMode",
    "MeanCost",
    "MultiExit",
    "OfframpError",
    "Patience",
    "PeakCost",
    "Plan",
    "QuotaMode",
    "Risk",
    "ThroughputMode",
    "Trace",
    "attach",
    "calibrate",
    "compile",
    "export_onnx",
    "fit",
    "load",
    "load_plan",
    "record",
    "report",
    "systems",
]
