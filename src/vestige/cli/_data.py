"""`vestige data WHAT`: a command for every row of `PREPARATIONS`, which calls the function of `vestige.prepare`."""

from vestige.cli._group import group
from vestige.settings import PREPARATIONS

data = group("data", "prepare", PREPARATIONS)
