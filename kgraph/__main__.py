"""``python -m kgraph`` is the command ``kgraph``."""

from kgraph.cli import app

app()
