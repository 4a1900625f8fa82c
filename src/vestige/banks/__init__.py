"""The bank: models trained on subsets of the data, the ground truth that scores are judged by."""

from vestige.banks._build import bank as bank, build_bank as build_bank
from vestige.banks._design import EVERYTHING as EVERYTHING
from vestige.banks._function import bank_of as bank_of
from vestige.banks._measure import margin as margin, measure as measure
from vestige.banks._store import (
    TRUTH_FORMATS as TRUTH_FORMATS,
    Bank as Bank,
    Measure as Measure,
    Texts as Texts,
    TruthFormat as TruthFormat,
)
