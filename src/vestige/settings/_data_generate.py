"""What `vestige data generate` takes."""

from typing import Any

from pydantic import Field, PositiveInt

from vestige.settings._preparation import PreparationSettings
from vestige.settings._shared import Precision


class GenerateSettings(PreparationSettings):
    """Let a model answer every prompt, greedily.

    Prompts keep their ids and columns; an answer that is there already is replaced.
    """

    model: Any = Field(description="Who answers: a hub id, a folder, a GGUF file, an adapter or, in Python, a module.")
    max_new_tokens: PositiveInt = Field(
        512, description="Longest answer in tokens; never more than its prompt leaves of the model's context."
    )
    chat: bool = Field(False, description="Put prompts into the model's chat template, as user turns.")
    keep_answers: bool = Field(False, description="Leave rows that have an answer as they are.")
    keep_flagged: bool = Field(False, description="Keep empty answers, marked in `problem`.")
    precision: Precision = Field("auto", description="Number format in which the model runs.")
    device: str = Field("auto", description="Where the model runs: auto, cpu, cuda, cuda:1 or mps.")
    tokenizer: Any = Field(None, description="Hub id or folder of the tokenizer, when it is not beside the model.")
