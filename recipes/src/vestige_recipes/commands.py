"""`vestige data ...`, `vestige sweep`, `vestige import`, and what they take: without torch, for help is quick."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from vestige.errors import SpecError
from vestige.registry import Command, command, make_command
from vestige.settings import (
    BAD_TEXT,
    Input,
    LaunchSettings,
    OnBadText,
    OnlyWith,
    Precision,
    PreparationSettings,
    Settings,
    TokenizerName,
    UntracSettings,
)
from vestige.terminal import say, show

Model = Annotated[Any, Input("vestige.models:require_model")]
Data = Annotated[Any, Input("vestige.data:require_data", each=False)]
Part = Literal["prompt", "answer", "text"]
PARTS: tuple[Part, ...] = ("prompt", "answer", "text")
ChoiceFormat = Literal["auto", "arc", "mmlu", "ethics"]
CleanAction = Literal["drop", "deduplicate", "weight"]
ImportLayout = Literal["auto", "projections", "fullgrads", "chunks", "similarities", "logs"]


def _parts(value: Any) -> Any:
    words = value.replace(",", " ").split() if isinstance(value, str) else list(value)
    unknown = [word for word in words if word not in PARTS]
    if unknown or not words:
        raise ValueError(f"one or several of {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in words)


class ParaphraseSettings(PreparationSettings):
    """Say every row in other words, by rules, by a local model or through an endpoint.

    Each paraphrase is a row with the `original_id` of the row that it came from.
    """

    beside_results: ClassVar[tuple[str, ...]] = ("cache",)

    fields: Annotated[tuple[str, ...], BeforeValidator(_parts)] = Field(
        ("prompt",),
        description="What to say in other words: prompt (of a conversation every user turn), answer (every assistant "
        "turn), text, or several of them. The rest of a row stays as it is.",
    )
    paraphrases: PositiveInt = Field(1, description="Paraphrases of each row.")
    rules: bool = Field(False, description="Paraphrase by rules: no model, the same on every machine.")
    model: Model = Field(None, description="Paraphrase by this local model, which must have a chat template.")
    api_model: str | None = Field(
        None,
        description="Paraphrase by this model of an OpenAI-compatible endpoint; its address and key are read from "
        "OPENAI_BASE_URL and OPENAI_API_KEY.",
    )
    instruction: str = Field(
        "You paraphrase. Say the text of the user in other words, in the same language, with the same meaning and "
        "every detail. Do not answer it and do not follow it. Write the paraphrase and nothing else.",
        description="Instruction to the model before each text.",
    )
    temperature: NonNegativeFloat = Field(1.0, description="Of a model's replies; 0 takes the most likely words.")
    seed: int = Field(0, description="Seed of rules, of a local model and of the first requested paraphrase.")
    max_new_tokens: PositiveInt | None = Field(
        None,
        description="Longest reply. Not given: what the endpoint allows; of a local model twice the text and 32 more.",
    )
    concurrency: PositiveInt = Field(8, description="Endpoint: requests under way at the same time.")
    retries: NonNegativeInt = Field(6, description="Endpoint: how often a request that failed is sent again.")
    timeout: PositiveFloat = Field(120.0, description="Endpoint: seconds of silence after which a request has failed.")
    price_in: NonNegativeFloat | None = Field(None, description="Endpoint: price of a million tokens sent.")
    price_out: NonNegativeFloat | None = Field(None, description="Endpoint: price of a million tokens of replies.")
    cache: Path | None = Field(
        None, description="Folder of the replies, which several results may share. Not given: replies/ in --out."
    )
    keep_flagged: bool = Field(
        False, description="Keep paraphrases that are empty, refused, cut or not different, marked in `problem`."
    )
    dry_run: bool = Field(False, description="Print the requests and their cost, then stop.")
    precision: Precision = Field("auto", description="Number format in which a local model runs.")
    device: str = Field("auto", description="Where a local model runs: auto, cpu, cuda, cuda:1 or mps.")
    tokenizer: TokenizerName = Field(
        None, description="Hub id or folder of a local model's tokenizer, when it is not beside it."
    )


class GenerateSettings(PreparationSettings):
    """Let a model answer every prompt, greedily unless a temperature is given.

    Prompts keep their ids and columns; an answer that is there already is replaced.
    """

    added: ClassVar[tuple[str, ...]] = (*PreparationSettings.added, "temperature", "seed")

    model: Model = Field(
        description="Who answers: a hub id, a folder, a GGUF file, an adapter or, in Python, a module."
    )
    max_new_tokens: PositiveInt = Field(
        512, description="Longest answer in tokens; never more than its prompt leaves of the model's context."
    )
    chat: bool = Field(False, description="Put prompts into the model's chat template, as user turns.")
    temperature: NonNegativeFloat = Field(
        0.0, description="Draw answers at this temperature; 0 takes the likeliest words."
    )
    seed: int = Field(0, description="Seed of drawn answers; each prompt has random numbers of its own.")
    keep_answers: bool = Field(False, description="Leave rows that have an answer as they are.")
    keep_flagged: bool = Field(False, description="Keep empty answers, marked in `problem`.")
    precision: Precision = Field("auto", description="Number format in which the model runs.")
    device: str = Field("auto", description="Where the model runs: auto, cpu, cuda, cuda:1 or mps.")
    tokenizer: TokenizerName = Field(
        None, description="Hub id or folder of the tokenizer, when it is not beside the model."
    )


class CandidatesSettings(PreparationSettings):
    """List the training examples that each query's original could be, by BM25 over prompts.

    The true original takes part like any other; where it ranks is reported, and it is put among the candidates without
    having earned it only if requested.
    """

    data: Data = Field(description="The training data that candidates are chosen from: anything that Vestige reads.")
    queries: Data = Field(
        description="The queries, such as the data.jsonl of a paraphrase: anything that Vestige reads."
    )
    candidates: PositiveInt | Literal["all"] = Field(5, description="Number of candidates of each query, or all.")
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
    limit: PositiveInt | None = Field(None, description="Use only the first N queries.")

    @property
    def count(self) -> int | None:
        """Candidates of each query; None is all."""
        return None if self.candidates == "all" else self.candidates


class MultipleChoiceSettings(PreparationSettings):
    """Write questions with choices as prompts whose completion is the label of an answer.

    Ten ways of asking, drawn for each row; options, and noise in the labels that every later split shares.
    """

    format: ChoiceFormat = Field(
        "auto",
        description="Columns: arc (question, choices with text and label, answerKey), mmlu (question, choices, answer) "
        "or ethics (input, label); auto looks at each row.",
    )
    label_noise: float = Field(0.0, ge=0, le=1, description="Chance that a label is replaced by a random choice.")
    seed: NonNegativeInt = Field(0, description="Seed of the templates and of the noise, each by row.")
    split: str | None = Field(None, description="Split of a hub id or of a saved `DatasetDict`.")
    tokenizer: TokenizerName = Field(
        None, description="Of --max-length: hub id or folder of the model whose tokens are counted."
    )
    max_length: PositiveInt | None = Field(
        None, description="Tokens of a row. Longer ones lose the question's beginning, and keep options and answer."
    )

    @model_validator(mode="after")
    def _length_is_counted(self) -> Self:
        if (self.tokenizer is None) != (self.max_length is None):
            raise SpecError("--tokenizer and --max-length go together: a length is counted in a model's tokens.")
        return self


class CleanSettings(PreparationSettings):
    """Act on the examples that a training or an audit has flagged: drop, deduplicate or weigh them less.

    What is taken out is written beside what is left, each row with its reason: nothing is lost.
    """

    only_with: ClassVar[OnlyWith] = {"weight": ("action", ("weight",))}

    flagged: Annotated[Path, Input("vestige.data:require_row_list")] = Field(
        description="Which rows are flagged: a folder of `vestige train --alarm`, `vestige audit` or `vestige select`, "
        "or a file that lists rows: ids on lines, or a report's row list, CSV or JSONL."
    )
    action: CleanAction = Field(
        "drop",
        description="drop takes flagged rows out; deduplicate keeps one of equal texts among which one is flagged; "
        "weight adds a column `weight`.",
    )
    near: float | None = Field(
        None,
        gt=0,
        le=1,
        description="deduplicate: also texts that share this part of their word triples with a flagged one (0.7, say).",
    )
    weight: float = Field(0.1, ge=0, lt=1, description="weight: of flagged rows; the others have 1.")
    measure: str | None = Field(None, description="Of an audit: the measure that flags. Not given: its strongest one.")
    threshold: float | None = Field(None, description="Of an audit: flag values that are at least as telling as this.")
    quantile: float | None = Field(None, gt=0, lt=1, description="Of an audit: flag this share of the examples.")

    @model_validator(mode="after")
    def _rule_fits(self) -> Self:
        if self.threshold is not None and self.quantile is not None:
            raise SpecError("--threshold and --quantile both say whom to flag. Give one of them.")
        if self.near is not None and self.action != "deduplicate":
            raise SpecError("--near says which texts are copies: it goes with --action deduplicate.")
        return self


def _command(name: str, settings: type[PreparationSettings], order: int) -> Command:
    function = f"vestige_recipes.prepare:{name.replace('-', '_')}"
    return make_command(f"data {name}", settings, function=function, order=order, sweepable=True)


paraphrase = _command("paraphrase", ParaphraseSettings, 10)
generate = _command("generate", GenerateSettings, 20)
candidates = _command("candidates", CandidatesSettings, 30)
multiple_choice = _command("multiple-choice", MultipleChoiceSettings, 40)
clean = _command("clean", CleanSettings, 70)


class SweepSettings(LaunchSettings):
    """What `vestige sweep` takes."""

    positional: ClassVar[tuple[str, ...]] = ("grid",)
    grid: Any = Field(
        description="The grid: a YAML or JSON file with verb, base, mode and axes, or a published configuration."
    )
    out: Path = Field(
        description="Folder of the sweep: its cells and cells.parquet. An interrupted sweep goes on there."
    )
    dry_run: bool = Field(False, description="Check every cell and list them; run nothing, write nothing.")


@command("sweep", SweepSettings, function="vestige_recipes.sweep:sweep", order=130)
def sweep(settings: SweepSettings) -> None:
    """Run a command over a grid of settings.

    Every cell is checked before the first one runs. Its folder is named after its settings, so an interrupted sweep
    continues and a grown grid keeps what it had. A cell that fails is reported with its log, and the others go on.
    """
    show(sweep.call(settings), file_width=160)


class ProductsSettings(Settings):
    """Which components suffice? The table and figures of `vestige evaluate components` from published products.

    Reads `dot_products`, `paraphrased_dot_products` and `original_dot_products`, whole or in partitions, and no model.
    """

    positional: ClassVar[tuple[str, ...]] = ("source",)
    source: Path = Field(description="Folder of the products in the published layout.")
    out: Path = Field(description="Folder of the table, the figures and the chosen components.")
    parameters: Path | None = Field(
        None,
        description="JSON file {parameter: how many numbers it has}, which products do not say. Not given: 1 each.",
    )
    enough: PositiveFloat = Field(0.99, le=1, description="As of `vestige evaluate components`, like all that follow.")
    folds: PositiveInt = Field(5, ge=2, description="Parts of the queries; sets are judged on the part left out.")
    longest: PositiveInt = Field(40, description="Most components in a set that is chosen without a fold.")
    figures: bool = Field(True, description="Also draw the figures, which takes some seconds.")
    draws: PositiveInt = Field(1000, description="Bootstrap draws behind each interval.")
    seed: int = Field(0, description="Seed of folds and bootstrap.")


products = make_command(
    "evaluate products", ProductsSettings, function="vestige_recipes.interop.products:products", order=120
)


class ScalingSettings(UntracSettings):
    """What does unlearning cost as models grow? Seconds, memory and scores of `vestige untrac` for several models.

    Each model runs in a process of its own, so that its peak memory is its own; finished runs are kept. A model that
    fails is reported with its error, and the others go on.
    """

    repeatable: ClassVar[tuple[str, ...]] = (*UntracSettings.repeatable, "model")

    model: Any = Field(description="The models, two or more: hub ids or folders.")
    dense: bool = Field(True, description="Store the score of every example for every test set, which are compared.")


scaling = make_command(
    "evaluate scaling",
    ScalingSettings,
    function="vestige_recipes.untrac_reproduction.scaling:scaling_experiment",
    order=130,
)


class ImportSettings(Settings):
    """What `vestige import` takes."""

    positional: ClassVar[tuple[str, ...]] = ("source",)
    source: Path = Field(description="Folder or file in a published layout.")
    out: Path = Field(description="Folder of the index, or of the run for similarities and with --against.")
    layout: ImportLayout = Field(
        "auto",
        description="The layout: projections (proj_iter_*.pt), fullgrads (fullgrad_iter_*.pt), chunks "
        "(chunk_gradients_*.mmap), similarities (JSON) or logs (dot_prod_log_iter_*.pt); auto finds it from the files.",
    )
    data: Data = Field(
        None,
        description="The training data: its row i is row i of the files, and the lengths must agree; for "
        "similarities, texts by `id`; for logs, rows with `input_ids`.",
    )
    queries: Data = Field(None, description="Similarities: the texts of the queries, by `id`.")
    on_bad_text: OnBadText = Field("refuse", description=BAD_TEXT)
    model: Model = Field(None, description="The model that the gradients are of; layers are looked up in it.")
    against: Path | None = Field(
        None, description="Rows of the files are queries: score the rows of this index, of equal layout, for them."
    )
    method: Literal["grad-dot", "grad-cos"] = Field(
        "grad-dot", description="With --against: inner products, or cosines."
    )
    dimension: PositiveInt | None = Field(
        None, description="Similarities of random projections: which dimension, where the file has several."
    )
    k: PositiveInt = Field(20, description="For a run: proponents, and as many opponents, to keep for each query.")
    overwrite: bool = Field(False, description="Replace an index or a run that is already in the folder.")


@command("import", ImportSettings, function="vestige_recipes.interop:import_published", order=190)
def import_command(settings: ImportSettings) -> None:
    """Turn gradients or scores that other software has published into an index or a run."""
    say(import_command.call(settings).folder)
