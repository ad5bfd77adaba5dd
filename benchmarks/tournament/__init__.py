"""Original networks, the same without norms, and what kgraph makes of them, trained on real images."""
