"""The on-disk index: manifest, shard plan, resumable shards, scanning, export."""

from vestige.index._examples import fingerprint_rows
from vestige.index._export import export_index
from vestige.index._files import check_disk
from vestige.index._manifest import (
    CompressionIdentity,
    DataIdentity,
    IndexedComponent,
    Manifest,
    ModelIdentity,
    PlanRecord,
    difference,
    read_manifest,
)
from vestige.index._plan import Plan, PlannedShard, plan_index
from vestige.index._run import IndexStatus, PlannedBatches, index_status, remove_index, write_shards
from vestige.index._shards import ShardContent
from vestige.index._store import Index, IndexBlock, ShardFault

__all__ = [
    "CompressionIdentity",
    "DataIdentity",
    "Index",
    "IndexBlock",
    "IndexStatus",
    "IndexedComponent",
    "Manifest",
    "ModelIdentity",
    "Plan",
    "PlanRecord",
    "PlannedBatches",
    "PlannedShard",
    "ShardContent",
    "ShardFault",
    "check_disk",
    "difference",
    "export_index",
    "fingerprint_rows",
    "index_status",
    "plan_index",
    "read_manifest",
    "remove_index",
    "write_shards",
]
