"""The on-disk index: manifest, shard plan, resumable shards, scanning, export."""

from vestige.index._budget import choose_spec
from vestige.index._build import build_index, draft_manifest, index
from vestige.index._compute import CompressedGradients, lay_out
from vestige.index._content import PART_BYTES, ShardContent
from vestige.index._difference import difference
from vestige.index._estimate import Estimate, estimate_cost
from vestige.index._examples import fingerprint_rows
from vestige.index._export import export, export_index
from vestige.index._export_rows import RowPart, parts_in_order
from vestige.index._from_rows import ReadRows, write_rows
from vestige.index._inputs import (
    Inputs,
    batch_tokens,
    read_data,
    read_inputs,
    tokenising_processes,
    tokens_at_most,
)
from vestige.index._interaction import longest_and_shortest, require_independence
from vestige.index._manifest import (
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
from vestige.index._plan import Plan, PlannedShard, plan_index
from vestige.index._run import TOKENS, IndexStatus, index_status, prepare_index, remove_index
from vestige.index._store import Index, IndexBlock, ShardFault
from vestige.index._work import IndexPlan, PlannedBatches

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
