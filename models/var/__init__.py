"""VAR: the class-conditional next-scale transformer (arXiv 2404.02905)."""
