"""``python -m offramp``."""

from offramp.cli import app

if __name__ == "__main__":
    app(prog_name="offramp")
