"""Published experiments, replayed with Vestige, and what only they need."""
