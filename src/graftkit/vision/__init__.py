"""Vision: features of a big network, grafted into a small one (arXiv 2507.19261)."""
