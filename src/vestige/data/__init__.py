"""Training data and queries: reading every source, tokenising with targets, batching by token budget."""

from vestige.data._batches import CutBatch, CutBatches, make_batch, plan_batches
from vestige.data._bm25 import Bm25Variant, LexicalIndex, prompt_of, words_of
from vestige.data._chat import as_conversation
from vestige.data._corpus import forget_tokens, tokenize_source, tokenize_stored
from vestige.data._fingerprint import data_fingerprint
from vestige.data._load import load_examples, load_queries, load_records
from vestige.data._questions import Frame, ask, frame_of, require_answers
from vestige.data._row_list import RowEntry, read_row_list, rows_named
from vestige.data._stored import EXAMPLES, GROUP_ROWS, StoredExamples, record_of
from vestige.data._tokenize import Encoder, tokenize
from vestige.data._types import NO_TARGET, Batch, Example, Message, TokenizedData

__all__ = [
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
    "RowEntry",
    "StoredExamples",
    "TokenizedData",
    "as_conversation",
    "ask",
    "data_fingerprint",
    "forget_tokens",
    "frame_of",
    "load_examples",
    "load_queries",
    "load_records",
    "make_batch",
    "plan_batches",
    "prompt_of",
    "read_row_list",
    "record_of",
    "require_answers",
    "rows_named",
    "tokenize",
    "tokenize_source",
    "tokenize_stored",
    "words_of",
]
from vestige.data._load import number_records as number_records
from vestige.data._load import open_source as open_source
from vestige.data._origin import parsed as parsed
from vestige.data._origin import place as place
