"""What `vestige data candidates` takes."""

from typing import Any, Literal

from pydantic import Field, PositiveInt

from vestige.settings._preparation import PreparationSettings


class CandidatesSettings(PreparationSettings):
    """List the training examples that each query's original could be, by BM25 over prompts.

    The true original takes part like any other; where it ranks is reported, and it is put among the candidates without
    having earned it only if asked.
    """

    data: Any = Field(description="The training data that candidates are chosen from: anything that Vestige reads.")
    queries: Any = Field(
        description="The queries, such as the data.jsonl of a paraphrase: anything that Vestige reads."
    )
    candidates: PositiveInt | Literal["all"] = Field(5, description="Candidates of each query: so many, or all.")
    truth: str = Field(
        "original_id", description="Column of the queries that holds the id of the original, or several."
    )
    include_original: bool = Field(
        False, description="Put the original in the last place where its score does not list it, as was published."
    )
    variant: Literal["okapi", "lucene"] = Field(
        "okapi",
        description="okapi, as published: words between blanks, capitals kept; lucene, as the method bm25 and "
        "`vestige evaluate components`: words of letters and digits, case-folded.",
    )
    limit: PositiveInt | None = Field(None, description="Use only so many queries, the first ones.")

    @property
    def count(self) -> int | None:
        """Candidates of each query; None is all."""
        return None if self.candidates == "all" else self.candidates
