"""Training data and queries: reading every source, tokenising with targets, batching by token budget."""

from typing import TYPE_CHECKING

from vestige.lazy import lazy_names

if TYPE_CHECKING:
    from vestige.data._blocks import Block as Block, pack_blocks as pack_blocks
    from vestige.data._bm25 import Bm25Variant as Bm25Variant, LexicalIndex as LexicalIndex
    from vestige.data._chat import as_conversation as as_conversation
    from vestige.data._encode import Rendered as Rendered, Span as Span, mark_targets as mark_targets
    from vestige.data._files import exists as exists
    from vestige.data._focus import describe_focus as describe_focus, find_focus as find_focus
    from vestige.data._focus_tokens import focus_queries as focus_queries, locate_spans as locate_spans
    from vestige.data._load import (
        load_examples as load_examples,
        load_queries as load_queries,
        load_records as load_records,
        names_a_place as names_a_place,
        require_queries as require_queries,
    )
    from vestige.data._questions import (
        Frame as Frame,
        ask as ask,
        frame_of as frame_of,
        prompt_of as prompt_of,
        require_answers as require_answers,
    )
    from vestige.data._records import (
        OnBadText as OnBadText,
        as_plain as as_plain,
        check_text as check_text,
        parse_record as parse_record,
        place as place,
        repair as repair,
    )
    from vestige.data._row_list import (
        RowEntry as RowEntry,
        describe_copies as describe_copies,
        read_row_list as read_row_list,
        require_row_list as require_row_list,
        rows_listed as rows_listed,
        rows_named as rows_named,
        text_groups as text_groups,
        token_groups as token_groups,
    )
    from vestige.data._rows import (
        conversation_columns as conversation_columns,
        find_unused_columns as find_unused_columns,
    )
    from vestige.data._sources import open_source as open_source, require_data as require_data
    from vestige.data._stored import (
        EXAMPLES as EXAMPLES,
        GROUP_ROWS as GROUP_ROWS,
        StoredExamples as StoredExamples,
        record_of as record_of,
        turn_record as turn_record,
    )
    from vestige.data._suffixes import (
        SuffixArray as SuffixArray,
        TokenSearch as TokenSearch,
        TokenSpan as TokenSpan,
        space_twins as space_twins,
    )
    from vestige.data._tokenize import Encoder as Encoder, tokenize as tokenize
    from vestige.data._tokens import (
        forget_tokens as forget_tokens,
        tokenize_source as tokenize_source,
    )
    from vestige.data._types import (
        ANY_EXAMPLES as ANY_EXAMPLES,
        NO_TARGET as NO_TARGET,
        Batch as Batch,
        CutBatch as CutBatch,
        CutBatches as CutBatches,
        Example as Example,
        Focus as Focus,
        Message as Message,
        Sharing as Sharing,
        TokenizedData as TokenizedData,
        data_fingerprint as data_fingerprint,
        make_batch as make_batch,
        plan_batches as plan_batches,
        send as send,
    )
    from vestige.data._write import record_line as record_line, write_rows as write_rows
    from vestige.parsing import words_of as words_of

__getattr__, __dir__, __all__ = lazy_names(__name__)
