"""The bank: models trained on subsets of the data, the ground truth that scores are judged by."""

from vestige.banks._bank import bank as bank, margin as margin, measure as measure
from vestige.banks._design import (
    EVERYTHING as EVERYTHING,
    random_subsets as random_subsets,
    read_lists as read_lists,
    run_seed as run_seed,
    without_each as without_each,
    without_each_source as without_each_source,
    without_one as without_one,
)
from vestige.banks._plan import bank_of as bank_of
from vestige.banks._store import (
    TRUTH_FORMATS as TRUTH_FORMATS,
    Bank as Bank,
    Measure as Measure,
    Texts as Texts,
    TruthFormat as TruthFormat,
)
