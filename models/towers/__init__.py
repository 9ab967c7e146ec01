"""Vision towers, of the semantic encoder and of its teachers, and their published weights."""
