"""What is trained: a tokenizer, a pixel decoder, text to image."""
