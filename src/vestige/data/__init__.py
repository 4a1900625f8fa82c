"""Training data and queries: reading every source, tokenising with targets, batching by token budget."""

from vestige.data._bm25 import Bm25Variant, LexicalIndex, prompt_of
from vestige.data._chat import as_conversation
from vestige.data._encode import Rendered, Span, mark_targets
from vestige.data._load import load_examples, load_queries, load_records, number_records
from vestige.data._questions import Frame, ask, frame_of, require_answers
from vestige.data._records import OnBadText, check_text, parse_record, place, repair
from vestige.data._row_list import (
    RowEntry,
    describe_copies,
    read_row_list,
    rows_listed,
    rows_named,
    text_groups,
    token_groups,
)
from vestige.data._rows import conversation_columns, find_unused_columns
from vestige.data._sources import open_source
from vestige.data._stored import EXAMPLES, GROUP_ROWS, StoredExamples, record_of, turn_record
from vestige.data._tokenize import Encoder, tokenize
from vestige.data._tokens import forget_tokens, tokenize_source, tokenize_stored
from vestige.data._types import (
    ANY_EXAMPLES,
    NO_TARGET,
    Batch,
    CutBatch,
    CutBatches,
    Example,
    Message,
    Sharing,
    TokenizedData,
    data_fingerprint,
    make_batch,
    plan_batches,
)
from vestige.data._write import as_plain, record_line, write_rows
from vestige.parsing import words_of

__all__ = [
    "ANY_EXAMPLES",
    "EXAMPLES",
    "GROUP_ROWS",
    "NO_TARGET",
    "Batch",
    "Bm25Variant",
    "CutBatch",
    "CutBatches",
    "Encoder",
    "Example",
    "Frame",
    "LexicalIndex",
    "Message",
    "OnBadText",
    "Rendered",
    "RowEntry",
    "Sharing",
    "Span",
    "StoredExamples",
    "TokenizedData",
    "as_conversation",
    "as_plain",
    "ask",
    "check_text",
    "conversation_columns",
    "data_fingerprint",
    "describe_copies",
    "find_unused_columns",
    "forget_tokens",
    "frame_of",
    "load_examples",
    "load_queries",
    "load_records",
    "make_batch",
    "mark_targets",
    "number_records",
    "open_source",
    "parse_record",
    "place",
    "plan_batches",
    "prompt_of",
    "read_row_list",
    "record_line",
    "record_of",
    "repair",
    "require_answers",
    "rows_listed",
    "rows_named",
    "text_groups",
    "token_groups",
    "tokenize",
    "tokenize_source",
    "tokenize_stored",
    "turn_record",
    "words_of",
    "write_rows",
]
