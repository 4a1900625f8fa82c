"""Data made from data: rows in other words, each with the id of the row that it came from."""

from vestige.prepare._candidate_rows import candidates as candidates
from vestige.prepare._candidates import Candidate as Candidate
from vestige.prepare._candidates import Candidates as Candidates
from vestige.prepare._candidates import find_candidates as find_candidates
from vestige.prepare._candidates import okapi_scores as okapi_scores
from vestige.prepare._clean import clean as clean
from vestige.prepare._generate import generate as generate
from vestige.prepare._multiple_choice import choices_of as choices_of
from vestige.prepare._multiple_choice import multiple_choice as multiple_choice
from vestige.prepare._paraphrase import paraphrase as paraphrase
from vestige.prepare._problems import PROBLEMS as PROBLEMS
from vestige.prepare._problems import problem_of as problem_of
from vestige.prepare._rules import paraphrase_by_rules as paraphrase_by_rules
from vestige.prepare._split import split as split
from vestige.prepare._tokenize import tokenize as tokenize
from vestige.prepare._write import Prepared as Prepared
from vestige.prepare._write import check_same_result as check_same_result
from vestige.prepare._write import fingerprint_of as fingerprint_of
from vestige.prepare._write import row_of as row_of
from vestige.prepare._write import write_prepared as write_prepared
