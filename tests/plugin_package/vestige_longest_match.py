"""A method of another package: the longest piece of text that an example and the answer have in common."""

from collections.abc import Iterator
from difflib import SequenceMatcher

import torch

from vestige.methods import Job, Method, method
from vestige.runs import Meaning, ScoreBlock


@method("longest-match")
class LongestMatch(Method):
    """Length in letters of the longest common substring of the query, with its answer, and the example."""

    meaning = Meaning(
        sign="no causal reading: zero = no letter in common, higher = a longer piece in common, never negative",
        unit="letters",
        target="text alone",
        normalisation="none",
        estimates="How much of the query and its answer stands in the example, word for word.",
        cost="No pass through the model; time grows with the product of the lengths.",
        limits="Blind to paraphrase; long examples lead.",
    )

    def blocks(self, job: Job) -> Iterator[ScoreBlock]:
        """Yield the scores of one example after the other."""
        for row, example in enumerate(job.train.examples):
            lengths = [float(longest_match(query.display, example.display)) for query in job.queries.examples]
            yield ScoreBlock(torch.tensor([row]), torch.tensor(lengths)[:, None])


def longest_match(one: str, other: str) -> int:
    """Return the length of the longest common substring, in letters."""
    return SequenceMatcher(None, one, other, autojunk=False).find_longest_match().size
