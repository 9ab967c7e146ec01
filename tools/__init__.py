"""Programs for people who work on the kernels; no part of the package."""
