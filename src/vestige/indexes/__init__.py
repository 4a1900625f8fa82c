"""The on-disk index: manifest, shard plan, resumable shards, scanning, export."""

from vestige.indexes._budget import choose_spec
from vestige.indexes._build import build_index, draft_manifest, index
from vestige.indexes._compute import CompressedGradients, lay_out
from vestige.indexes._content import PART_BYTES, ShardContent
from vestige.indexes._difference import difference
from vestige.indexes._estimate import Estimate, estimate_cost
from vestige.indexes._examples import fingerprint_rows
from vestige.indexes._export import export, export_index
from vestige.indexes._export_rows import RowPart, parts_in_order
from vestige.indexes._from_rows import ReadRows, write_rows
from vestige.indexes._inputs import (
    Inputs,
    batch_tokens,
    read_data,
    read_inputs,
    tokenising_processes,
    tokens_at_most,
)
from vestige.indexes._interaction import longest_and_shortest, require_independence
from vestige.indexes._manifest import (
    IMPORTED_SPEC,
    WHOLE_MODEL,
    CompressionIdentity,
    DataIdentity,
    ImportRecord,
    IndexedComponent,
    Manifest,
    ModelIdentity,
    PlanRecord,
    Span,
    read_manifest,
)
from vestige.indexes._plan import Plan, PlannedShard, plan_index
from vestige.indexes._run import TOKENS, IndexStatus, index_status, prepare_index, remove_index
from vestige.indexes._store import Index, IndexBlock, ShardFault
from vestige.indexes._work import IndexPlan, PlannedBatches

__all__ = [
    "IMPORTED_SPEC",
    "PART_BYTES",
    "TOKENS",
    "WHOLE_MODEL",
    "CompressedGradients",
    "CompressionIdentity",
    "DataIdentity",
    "Estimate",
    "ImportRecord",
    "Index",
    "IndexBlock",
    "IndexPlan",
    "IndexStatus",
    "IndexedComponent",
    "Inputs",
    "Manifest",
    "ModelIdentity",
    "Plan",
    "PlanRecord",
    "PlannedBatches",
    "PlannedShard",
    "ReadRows",
    "RowPart",
    "ShardContent",
    "ShardFault",
    "Span",
    "batch_tokens",
    "build_index",
    "choose_spec",
    "difference",
    "draft_manifest",
    "estimate_cost",
    "export",
    "export_index",
    "fingerprint_rows",
    "index",
    "index_status",
    "lay_out",
    "longest_and_shortest",
    "parts_in_order",
    "plan_index",
    "prepare_index",
    "read_data",
    "read_inputs",
    "read_manifest",
    "remove_index",
    "require_independence",
    "tokenising_processes",
    "tokens_at_most",
    "write_rows",
]
