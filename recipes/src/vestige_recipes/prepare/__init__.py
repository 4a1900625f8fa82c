"""Rows made from rows: in other words, answered, with candidates, as multiple choice, or cleaned."""

from vestige_recipes.prepare.candidate_lists import (
    Candidate as Candidate,
    Candidates as Candidates,
    candidates as candidates,
    find_candidates as find_candidates,
    okapi_scores as okapi_scores,
)
from vestige_recipes.prepare.choice_prompts import choices_of as choices_of, multiple_choice as multiple_choice
from vestige_recipes.prepare.cleaning import clean as clean
from vestige_recipes.prepare.generation import generate as generate
from vestige_recipes.prepare.paraphrasing import paraphrase as paraphrase
from vestige_recipes.prepare.replies import (
    PROBLEMS as PROBLEMS,
    paraphrase_by_rules as paraphrase_by_rules,
    problem_of as problem_of,
)
