"""Order and chaos: r, the scaled NTK, borders and checkerboards (arXiv 1907.05715)."""
