"""`Audit`: the run of an audit, open for questions. Needs neither the model nor torch."""

import html
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute
import pyarrow.parquet as parquet
from jaxtyping import Bool, Float

from vestige.errors import DataError, MissingExtra, UserError
from vestige.runs._audit_record import (
    AuditRecord,
    JudgementRecord,
    Truth,
    format_span,
    low_stands_out,
    read_audit_record,
)
from vestige.runs._listed import ScoreTable
from vestige.storage import local_result
from vestige.tables import read_table, reading, write_table
from vestige.terminal import shorten

if TYPE_CHECKING:
    import pandas


KEYS = ("checkpoint", "layer", "row", "example_id")
REMEDY = "Make the audit again."


def evidence_table(
    example_ids: Sequence[str],
    measures: Mapping[str, Float[np.ndarray, "example"]],
    *,
    checkpoint: int = -1,
    layer: int | None = None,
    rows: Sequence[int] | None = None,
) -> pa.Table:
    """Return what was measured at one checkpoint, and at one layer if the measures have one.

    Args:
        example_ids: In the order of the values.
        measures: By name; NaN, which becomes null, where a measure cannot be computed.
        checkpoint: Steps trained; -1 for a model whose steps are not known.
        layer: None for measures without layers.
        rows: Positions of the examples, where ids may repeat; a column of its own.

    Raises:
        DataError: A measure that has not one value per example, or the name of a key.
    """
    for name, values in measures.items():
        if name in KEYS or np.shape(values) != (len(example_ids),):
            raise DataError(
                f"Measure {name!r} of shape {np.shape(values)} does not go with {len(example_ids)} examples."
            )
    count = len(example_ids)
    return pa.table(
        {
            "checkpoint": pa.array([checkpoint] * count, pa.int64()),
            "layer": pa.array([layer] * count, pa.int32()),
            **({} if rows is None else {"row": pa.array(list(rows), pa.int64())}),
            "example_id": pa.array(list(example_ids), pa.string()),
            **{name: pa.array(np.asarray(each, dtype=np.float64), from_pandas=True) for name, each in measures.items()},
        }
    )


def write_evidence(path: str | Path, tables: Sequence[pa.Table]) -> None:
    """Put tables of all checkpoints and layers into one Parquet file; a measure that one of them lacks is null there.

    Raises:
        DataError: There is no table, or two hold the same checkpoint, layer and example.
    """
    if not tables:
        raise DataError("There is no evidence to write.")
    whole = pa.concat_tables(tables, promote_options="default")
    keys = ["checkpoint", "layer", "row" if "row" in whole.column_names else "example_id"]
    distinct = whole.select(keys).group_by(keys).aggregate([])
    if len(distinct) != len(whole):
        raise DataError("Two rows are about the same example at the same checkpoint and layer. Merge their measures.")
    write_table(Path(path), whole)


def read_evidence(
    path: str | Path, measures: Sequence[str] | None = None, *, checkpoint: int | None = None
) -> pa.Table:
    """Return the evidence, or some measures of it, or one checkpoint.

    Raises:
        DataError: A measure that the file does not hold.
        CorruptFile: It does not read.
    """
    path = Path(path)
    with reading(path, REMEDY):
        held = parquet.read_schema(path).names
    keys = [name for name in KEYS if name in held]
    wanted = held if measures is None else [*keys, *measures]
    if unknown := sorted(set(wanted) - set(held)):
        raise DataError(f"{path} holds no {', '.join(unknown)}; it holds {', '.join(held[len(keys) :])}.")
    with reading(path, REMEDY):
        table = parquet.read_table(path, columns=wanted, memory_map=False)
    return table if checkpoint is None else table.filter(compute.field("checkpoint") == checkpoint)


EVIDENCE_FILE, EXAMPLES_FILE, TOKENS_FILE, FIGURES = "evidence.parquet", "examples.parquet", "tokens.parquet", "figures"
_TEXTS = [(name, pa.string()) for name in ("example_id", "part", "source", "label", "class")]
EXAMPLES = pa.schema(
    [("row", pa.int64()), *_TEXTS, ("flag", pa.bool_()), ("targets", pa.int64()), ("text", pa.string())]
)
"""Columns of the examples."""
TOKENS = pa.schema(
    [
        ("row", pa.int64()),
        ("position", pa.int64()),
        ("token", pa.string()),
        *((name, pa.float64()) for name in ("log_probability", "standardised", "against")),
    ]
)
"""Columns of the tokens; null at a position that is no target."""
PREFERRED = ("lira", "counterfactual", "recitation", "extraction", "answer_loss", "loss")
"""What a list is ordered by where no measure is given: the first of these that was measured."""


CONTAMINATION_FILE = "contamination.parquet"
_OF_ITEMS = ("share", "similarity", "loss", "answer_loss", "accuracy", "perplexity_ratio")
ITEMS = pa.schema(
    [
        *((name, pa.string()) for name in ("item_id", "kind", "example_id", "span", "most_similar", "text")),
        *((name, pa.int64()) for name in ("words", "score_rank")),
        *((name, pa.float64()) for name in _OF_ITEMS),
    ]
)
"""Columns of the items of a benchmark."""


class EvidenceRow(NamedTuple):
    """One example of a list, with all that was measured of it."""

    rank: int
    example_id: str
    row: int
    """Position in the data; the holdout's follow."""
    value: float
    evidence: dict[str, float]
    """Every measure that is known of the example."""
    text: str


def _cells(row: EvidenceRow) -> tuple[str, ...]:
    return str(row.rank), shorten(row.example_id), f"{row.value:.4g}", row.text


class Audit:
    """The evidence of an audit, per example, checkpoint and layer.

        audit = Audit.open("run")
        print(audit.top(k=10, measure="lira"))
        audit.values("loss", checkpoint=20)

    A checkpoint is given by its number in `run.checkpoints`; the model under audit is the last of them and the default.
    """

    def __init__(self, folder: Path, run: AuditRecord) -> None:
        self.folder = folder
        self.run = run
        """Everything in `run.json`."""

    @classmethod
    def open(cls, folder: str | Path) -> "Audit":
        """Open the audit in a folder.

        Raises:
            UserError: `folder` is no audit, or a newer Vestige wrote it.
            CorruptFile: Its record is damaged.
        """
        folder = local_result(folder)
        return cls(Path(folder), read_audit_record(folder))

    def __str__(self) -> str:
        lines = [self._title]
        for finding in self.run.findings:
            lines += ["", finding.title, *(f"  {sentence}" for sentence in finding.sentences)]
            lines += [line for each in finding.commands for line in (f"  {each.purpose}:", f"    {each.command}")]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        parts = [f"<p><b>{html.escape(self._title)}</b></p>"]
        for finding in self.run.findings:
            sentences = "<br>".join(map(html.escape, finding.sentences))
            commands = [f"{each.purpose}:\n{each.command}" for each in finding.commands]
            listed = f"<pre>{html.escape(chr(10).join(commands))}</pre>" if commands else ""
            parts.append(f"<p><b>{html.escape(finding.title)}</b><br>{sentences}</p>{listed}")
        return "".join(parts)

    @property
    def _title(self) -> str:
        run = self.run
        count = f" and {len(run.checkpoints) - 1} before it" if len(run.checkpoints) > 1 else ""
        return (
            f"Audit of {run.data.examples:,} examples of {run.data.name} under {run.model.name}{count}, by "
            f"{len(run.measures)} measures"
        )

    @property
    def measures(self) -> list[str]:
        """Names of everything that was measured of examples."""
        return [name for name in self.run.measures if name not in ("smi", "weights")]

    @property
    def checkpoints(self) -> list[int]:
        """Numbers of the checkpoints, in order; the last is the model under audit."""
        return [each.number for each in self.run.checkpoints]

    @cached_property
    def examples(self) -> pa.Table:
        """Row, id, part (`data` or `holdout`), source, label, class, flag, target tokens and text of each example."""
        return read_table(self.folder / EXAMPLES_FILE, EXAMPLES, REMEDY, required=("row", "example_id", "part", "text"))

    @cached_property
    def own(self) -> Bool[np.ndarray, "example"]:
        """True for the data's own examples, False for the holdout's, in the order of `examples`."""
        return np.array(self.examples["part"].to_pylist()) == "data"

    @cached_property
    def tokens(self) -> pa.Table | None:
        """Each token of the examples that lead the list, with its log-probability (nats) and what it is compared with.

        `standardised` is the log-probability less its mean, over its deviation, over the vocabulary; `against` is the
        log-probability under `run.tokens_against`. None for an audit without tokens.
        """
        path = self.folder / TOKENS_FILE
        return read_table(path, TOKENS, REMEDY, required=("row", "position", "token")) if path.is_file() else None

    @cached_property
    def contamination(self) -> pa.Table | None:
        """Each item of the benchmark: what of the data it stands in, and the model's answer to it; None without one."""
        path = self.folder / CONTAMINATION_FILE
        return read_table(path, ITEMS, REMEDY, required=("item_id", "kind", "text")) if path.is_file() else None

    def table(
        self, measures: Sequence[str] | None = None, *, checkpoint: int | None = None, layer: int | None = None
    ) -> pa.Table:
        """Return the evidence: a row per example and checkpoint, and for measures of hidden states per layer.

        Args:
            measures: Names of columns; all if not given. One is read without the others.
            checkpoint: One of them.
            layer: One of them; the rows of measures without layers are left out.

        Raises:
            DataError: A measure that the run does not hold.
        """
        found = read_evidence(self.folder / EVIDENCE_FILE, measures, checkpoint=checkpoint)
        return found if layer is None else found.filter(compute.field("layer") == layer)

    def values(
        self, measure: str, *, checkpoint: int | None = None, layer: int | None = None
    ) -> Float[np.ndarray, "example"]:
        """Return one measure of every example, in the order of `examples`; NaN where it cannot be computed.

        Args:
            measure: Its name.
            checkpoint: The model under audit if not given.
            layer: Of a measure of hidden states: the main layer if not given.

        Raises:
            DataError: The run does not hold it.
            UserError: There is no such checkpoint or layer.
        """
        number = self.checkpoints[-1] if checkpoint is None else checkpoint
        if measure in self.run.measures and not self._is_held(measure):
            return np.full(len(self.examples), np.nan)
        found = self.table([measure], checkpoint=number)
        if self._is_layered(measure):
            found = found.filter(compute.field("layer") == (self.run.main_layer if layer is None else layer))
        else:
            found = found.filter(compute.field("layer").is_null())
        if not len(found):
            held = ", ".join(str(each.layer) for each in self.run.layers) or "none"
            raise UserError(
                f"No checkpoint {number} with layer {layer}: checkpoints {self.checkpoints}, layers {held}."
            )
        values = np.full(len(self.examples), np.nan)
        with reading(self.folder / EVIDENCE_FILE, REMEDY):
            values[found["row"].to_numpy()] = found[measure].to_numpy()
        return values

    def top(
        self, k: int = 10, measure: str | None = None, *, checkpoint: int | None = None, reverse: bool = False
    ) -> ScoreTable[EvidenceRow]:
        """Return the examples of the data that stand out by a measure: those that the model has memorized best.

        By psmi and mahalanobis the least typical ones, which are those at risk of being memorized. Of examples with
        equal values the longer ones come first.

        Args:
            k: How many.
            measure: What to order by; not given, the strongest evidence that was computed.
            checkpoint: The model under audit if not given.
            reverse: Begin at the other end.

        Raises:
            DataError: The run does not hold the measure.
            UserError: Nothing was measured of any example.
        """
        name = measure or self.preferred
        values = self.values(name, checkpoint=checkpoint)
        rows = np.flatnonzero(self.own & ~np.isnan(values))
        ordered = values[rows] if self.lowest_first(name) != reverse else -values[rows]
        chosen = rows[np.lexsort((-self.examples["targets"].to_numpy()[rows], ordered))][:k]
        ids, texts = self.examples["example_id"], self.examples["text"]
        others = {each: self.values(each, checkpoint=checkpoint) for each in self.measures if self._is_held(each)}
        listed = [
            EvidenceRow(
                rank,
                ids[int(row)].as_py(),
                int(row),
                float(values[row]),
                {each: float(column[row]) for each, column in others.items() if np.isfinite(column[row])},
                texts[int(row)].as_py(),
            )
            for rank, row in enumerate(chosen, 1)
        ]
        order = "lowest" if self.lowest_first(name) != reverse else "highest"
        title = f"{name}, {order} first: evidence about examples, no verdict on any of them"
        return ScoreTable(listed, ("rank", "example", name, "text"), _cells, title)

    @property
    def preferred(self) -> str:
        """The strongest evidence that was computed for any example.

        Raises:
            UserError: There is none.
        """
        total = len(self.examples)
        for name in (*PREFERRED, *self.measures):
            if name in self.run.measures and self._is_held(name) and self.run.measures[name].missing < total:
                return name
        raise UserError(f"{self.folder} measured nothing of examples: requested were {', '.join(self.run.measures)}.")

    def lowest_first(self, measure: str) -> bool:
        """Return whether low values of a measure are what stands out."""
        return measure in self.run.measures and low_stands_out(self.run.measures[measure].high)

    def judgement(self, truth: Truth | None = None, *, checkpoint: int | None = None) -> list[JudgementRecord]:
        """Return how well measures find what is to be found; the blind baseline is in every list."""
        return [
            each
            for each in self.run.judgement
            if (truth is None or each.truth == truth) and (checkpoint is None or each.checkpoint in (None, checkpoint))
        ]

    def to_pandas(self) -> "pandas.DataFrame":
        """Return the evidence as a data frame, with the texts of the examples.

        Raises:
            MissingExtra: pandas is not installed.
        """
        try:
            import pandas  # noqa: F401
        except ImportError as error:
            raise MissingExtra("pandas is not installed. Type: pip install pandas") from error
        return self.table().to_pandas().merge(self.examples.drop(["example_id"]).to_pandas(), on="row")

    def _is_layered(self, measure: str) -> bool:
        return measure in self.run.measures and self.run.measures[measure].layered

    @cached_property
    def _columns(self) -> set[str]:
        with reading(self.folder / EVIDENCE_FILE, REMEDY):
            return set(parquet.read_schema(self.folder / EVIDENCE_FILE).names)

    def _is_held(self, measure: str) -> bool:
        return measure in self._columns and not (self._is_layered(measure) and self.run.main_layer is None)


def judgement_table(truth: str, rows: Sequence[JudgementRecord]) -> str:
    """Return how well each measure predicts what is known, a line for each."""
    kinds = {"membership": "members", "flag": "flagged examples"}
    found = kinds.get(truth, "examples memorized by the bank's measure")
    lines = [f"{rows[0].found:,} {found} among {rows[0].others:,} others"]
    lines += [f"  {'measure':<18}{'AUC [95 %]':<24}{'TPR at 1 % FPR':<24}{'FPR at 75 % TPR'}"]
    for row in rows:
        low = next((rate for rate in row.tpr_at if rate.level == 0.01), None)
        high = next(iter(row.fpr_at), None)
        unresolved = "" if low is None or low.resolved else "  (too few others for 1 %)"
        rates = ["" if rate is None else format_span(rate.rate, "undefined") for rate in (low, high)]
        lines.append(f"  {row.measure:<18}{format_span(row.auc, 'undefined'):<24}{rates[0]:<24}{rates[1]}{unresolved}")
    return "\n".join(lines)
