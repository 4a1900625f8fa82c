"""Writing of a run directory, so that it is there whole or not at all."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from vestige.errors import IndexMismatch, UserError, VestigeError
from vestige.runs import _tables as tables
from vestige.runs._dense import names_of, write_dense
from vestige.runs._digests import digests_of
from vestige.runs._record import DENSE_FILE, RECORD_FILE, RunRecord, is_run
from vestige.runs._self_influence import write_self_influence
from vestige.runs._tables import ComponentScores, TokenScores
from vestige.runs._token_text import Decoder
from vestige.runs._topk import RankedScore
from vestige.storage import remove_partial, require_no_links, require_no_others, stage_folder

if TYPE_CHECKING:
    from vestige.data import TokenizedData


RUN_FILES = (
    RECORD_FILE,
    *(f"{name}.parquet" for name in ("scores", "examples", "queries", "components", "tokens", "self_influence")),
    *("evidence.parquet", "curves.parquet", DENSE_FILE, "profile.json", "report.html"),
    *(f"figures/*.{kind}" for kind in ("png", "pdf")),
    *(f"damping-*/{name}.parquet" for name in ("scores", "examples", "queries", "components")),
    *(f"damping-*/{name}" for name in (RECORD_FILE, DENSE_FILE, "report.html")),
)
"""What a run may consist of; anything else in its folder is not ours, and keeps it from being replaced."""


class RunTables(NamedTuple):
    """The content of a run directory beside `run.json`."""

    train: "TokenizedData"
    queries: "TokenizedData"
    ranked: Sequence[RankedScore]
    generated: Sequence[bool]
    """Per query: True where the answer is the model's own."""
    losses: Sequence[float] | None = None
    """Per query: its loss under the model; None for methods without a model."""
    tokenizer: Decoder | None = None
    components: Sequence[ComponentScores] | None = None
    tokens: Sequence[TokenScores] | None = None
    dense: Float[np.ndarray, "query example"] | None = None
    self_scores: Float[np.ndarray, "example"] | None = None
    """Per training example: its score for itself."""


def check_target(folder: str | Path, *, overwrite: bool = False) -> None:
    """Raise unless a run may be written to `folder`; call it before the work that leads there.

    Raises:
        IndexMismatch: a run is there already and `overwrite` is False.
        UserError: `folder` is a file, or holds something that is not a run or not of it: it is never replaced.
    """
    folder = Path(folder)
    if folder.is_file():
        raise UserError(f"{folder} is a file. Give a folder for the run: --out {folder}.run")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not is_run(folder):
        raise UserError(
            f"{folder} holds files that are not a run, and is left alone.\nGive another folder: --out {folder}/run"
        )
    if not overwrite:
        # A command that was killed right behind its last rename left its pieces.
        remove_partial(folder, RECORD_FILE)
        raise IndexMismatch(
            f"{folder} holds a run already; nothing was changed.\n"
            "Give another folder with --out, or replace it with --overwrite."
        )
    require_no_others(folder, RUN_FILES)
    require_no_links(folder)


def write_run(
    folder: str | Path,
    record: RunRecord,
    content: RunTables,
    *,
    overwrite: bool = False,
    add: Callable[[Path], None] | None = None,
) -> Path:
    """Write the run directory and return its path.

    Everything is written to a new folder beside it, flushed to the disk, and renamed: a kill never
    leaves half a run. Replacing a run takes two renames; killed between them, the old run lies beside, its
    name ending in `.replaced`, until the next command for this folder.

    Args:
        folder: Of the run.
        record: Content of `run.json`.
        content: The tables.
        overwrite: Replace a run that is there.
        add: Writes what else belongs to the run into the new folder, before that is moved.

    Raises:
        IndexMismatch: a run is there already and `overwrite` is False.
        UserError: `folder` is a file or holds something that is not a run.
    """
    folder = Path(folder)
    check_target(folder, overwrite=overwrite)
    _check_ids(content.queries)
    with stage_folder(folder, replace=overwrite) as attempt:
        _write_tables(attempt, record, content)
        if add is not None:
            add(attempt)
        record = record.model_copy(update={"files": digests_of(attempt)})
        # Last, so that a folder with a record is complete even where a rename is not atomic.
        (attempt / RECORD_FILE).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return folder


def _check_ids(queries: "TokenizedData") -> None:
    ids = [example.id for example in queries.examples]
    if len(set(ids)) != len(ids):
        repeated = next(name for name in ids if ids.count(name) > 1)
        raise UserError(
            f"Two queries have the id {repeated!r}, so their answers could not be distinguished.\n"
            "Give every query its own `id`, or none: then they are numbered."
        )


def _write_tables(folder: Path, record: RunRecord, content: RunTables) -> None:
    train, queries, tokenizer = content.train, content.queries, content.tokenizer
    referenced = [score.row for score in content.ranked]
    written: dict[str, pa.Table] = {
        "scores": tables.scores_table(content.ranked, train, queries),
        "examples": tables.examples_table(referenced, train, tokenizer),
        "queries": tables.queries_table(queries, tokenizer, content.generated, content.losses),
    }
    if content.components is not None:
        written["components"] = tables.components_table(content.components, record.components, train, queries)
    if content.tokens is not None:
        written["tokens"] = tables.tokens_table(content.tokens, train, queries, tokenizer)
    for name, table in written.items():
        pq.write_table(table, folder / f"{name}.parquet", compression="zstd")
    if content.self_scores is not None:
        write_self_influence(folder / "self_influence.parquet", content.self_scores, names_of(train.examples))
    if content.dense is not None:
        shape = content.dense.shape
        if shape != (len(queries), len(train)):
            raise VestigeError(f"Dense scores of shape {shape} for {len(queries)} queries x {len(train)} examples.")
        write_dense(folder / DENSE_FILE, content.dense, names_of(queries.examples), names_of(train.examples))
