"""The shapes world: a small picture world whose truth is known, and the models trained on it."""
