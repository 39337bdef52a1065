"""Engines for models that answer once: recording, and the three modes of running. `offramp.engines.classify.engine` is the way in."""

from offramp.engines.classify.engine import Answers, Latency, Mode, Quota, Runner, Throughput, measure_table, quota_sizes

__all__ = ["Answers", "Latency", "Mode", "Quota", "Runner", "Throughput", "measure_table", "quota_sizes"]
