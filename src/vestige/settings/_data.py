"""What `vestige data` can do with rows: one row a kind. Its settings' docstring is the help of its command.

`vestige data paraphrase` takes the settings of its row and calls `vestige.prepare.paraphrase`.
"""

from vestige.settings._base import Settings
from vestige.settings._data_generate import GenerateSettings
from vestige.settings._data_paraphrase import ParaphraseSettings

PREPARATIONS: dict[str, type[Settings]] = {
    "paraphrase": ParaphraseSettings,
    "generate": GenerateSettings,
}
