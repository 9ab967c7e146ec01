"""Training of the tokenizers: entry points run by ``torchrun`` and what they share."""
