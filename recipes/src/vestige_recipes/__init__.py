"""Published experiments, replayed with Vestige, and what only they need."""

from vestige_recipes.studies import study as study
