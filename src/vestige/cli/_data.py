"""`vestige data WHAT`: data made from data. Recipes bring more of them."""

from vestige.registry import make_command
from vestige.settings import SplitSettings, TokenizeSettings

split = make_command("data split", SplitSettings, function="vestige.prepare:split", order=50, sweepable=True)
tokenize = make_command(
    "data tokenize", TokenizeSettings, function="vestige.prepare:tokenize", order=60, sweepable=True
)
