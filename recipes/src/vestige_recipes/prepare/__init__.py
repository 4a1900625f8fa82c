"""Rows made from rows: in other words, answered, with candidates, as multiple choice, or cleaned."""

from vestige_recipes.prepare._candidates import (
    Candidate as Candidate,
    Candidates as Candidates,
    candidates as candidates,
    find_candidates as find_candidates,
    okapi_scores as okapi_scores,
)
from vestige_recipes.prepare._clean import clean as clean
from vestige_recipes.prepare._generate import generate as generate
from vestige_recipes.prepare._multiple_choice import choices_of as choices_of, multiple_choice as multiple_choice
from vestige_recipes.prepare._paraphrase import paraphrase as paraphrase
from vestige_recipes.prepare._replies import PROBLEMS as PROBLEMS, problem_of as problem_of
from vestige_recipes.prepare._rules import paraphrase_by_rules as paraphrase_by_rules
