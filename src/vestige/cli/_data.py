"""`vestige data WHAT`: data made from data."""

from vestige.registry import printed_command
from vestige.settings import (
    CandidatesSettings,
    CleanSettings,
    GenerateSettings,
    MultipleChoiceSettings,
    ParaphraseSettings,
    SplitSettings,
    TokenizeSettings,
)

paraphrase = printed_command(
    "data paraphrase", ParaphraseSettings, function="vestige.prepare:paraphrase", order=10, sweepable=True
)
generate = printed_command(
    "data generate", GenerateSettings, function="vestige.prepare:generate", order=20, sweepable=True
)
candidates = printed_command(
    "data candidates", CandidatesSettings, function="vestige.prepare:candidates", order=30, sweepable=True
)
multiple_choice = printed_command(
    "data multiple-choice",
    MultipleChoiceSettings,
    function="vestige.prepare:multiple_choice",
    order=40,
    sweepable=True,
)
split = printed_command("data split", SplitSettings, function="vestige.prepare:split", order=50, sweepable=True)
tokenize = printed_command(
    "data tokenize", TokenizeSettings, function="vestige.prepare:tokenize", order=60, sweepable=True
)
clean = printed_command("data clean", CleanSettings, function="vestige.prepare:clean", order=70, sweepable=True)
