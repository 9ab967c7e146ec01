"""Understanding: a language model that reads a tokenizer's features (arXiv 2412.03069, 3.4)."""
