"""The wheel that is published: `python -m tools.wheel`, or `make wheel`."""
