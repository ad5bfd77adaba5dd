"""Fluctuations of chains of finite width under orthogonal and Gaussian weights (arXiv 2310.07765)."""
