"""What `vestige data` can do with rows: one row a kind. Its settings' docstring is the help of its command.

`vestige data paraphrase` takes the settings of its row and calls `vestige.prepare.paraphrase`.
"""

from vestige.settings._base import Settings
from vestige.settings._data_candidates import CandidatesSettings
from vestige.settings._data_generate import GenerateSettings
from vestige.settings._data_paraphrase import ParaphraseSettings
from vestige.settings._data_rows import CleanSettings, MultipleChoiceSettings, SplitSettings, TokenizeSettings

PREPARATIONS: dict[str, type[Settings]] = {
    "paraphrase": ParaphraseSettings,
    "generate": GenerateSettings,
    "candidates": CandidatesSettings,
    "multiple-choice": MultipleChoiceSettings,
    "split": SplitSettings,
    "tokenize": TokenizeSettings,
    "clean": CleanSettings,
}
