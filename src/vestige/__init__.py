"""Vestige: which training examples made a language model behave as it does."""
