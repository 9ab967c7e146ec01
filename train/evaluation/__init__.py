"""How good a tokenizer is: reconstruction, FID, and what its codes stand for."""
