"""`vestige evaluate WHAT`: a command for every row of `EVALUATIONS`, which calls the function of that name."""

from vestige.cli._group import group
from vestige.settings import EVALUATIONS

evaluate = group("evaluate", "evaluate", EVALUATIONS)
