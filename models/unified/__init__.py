"""One transformer both ways: text to image and understanding with the same weights."""
