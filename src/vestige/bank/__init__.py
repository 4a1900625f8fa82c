"""The bank: models trained on subsets of the data, the ground truth that scores are judged by."""

from vestige.bank._build import bank as bank
from vestige.bank._build import build_bank as build_bank
from vestige.bank._design import EVERYTHING as EVERYTHING
from vestige.bank._function import bank_of as bank_of
from vestige.bank._measure import margin as margin
from vestige.bank._measure import measure as measure
from vestige.bank._store import TRUTH_FORMATS as TRUTH_FORMATS
from vestige.bank._store import Bank as Bank
from vestige.bank._store import Measure as Measure
from vestige.bank._store import Texts as Texts
from vestige.bank._store import TruthFormat as TruthFormat
