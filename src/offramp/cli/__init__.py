"""The command line: ``offramp`` and ``python -m offramp``."""

from offramp.cli.app import app

__all__ = ["app"]
