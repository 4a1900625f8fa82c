"""Published experiments in miniature and at full size: what they found, found again, with gates."""

from vestige.studies._format_trap import format_trap as format_trap
from vestige.studies._markov import MarkovCorpora as MarkovCorpora
from vestige.studies._markov import markov_corpora as markov_corpora
from vestige.studies._registry import Gate as Gate
from vestige.studies._registry import Outcome as Outcome
from vestige.studies._registry import StudyReport as StudyReport
from vestige.studies._registry import study_names as study_names
from vestige.studies._study import study as study
