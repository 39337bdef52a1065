"""The command line: ``offramp`` and ``python -m offramp``."""

from offramp.cli.base import app

# Each adds its commands to the app; help lists them in this order.
# isort: off
from offramp.cli import work  # noqa: F401
from offramp.cli import trial  # noqa: F401
from offramp.cli import probing  # noqa: F401
from offramp.cli import generate  # noqa: F401
from offramp.cli import export_draft  # noqa: F401
from offramp.cli import methods  # noqa: F401
# isort: on

__all__ = ["app"]
