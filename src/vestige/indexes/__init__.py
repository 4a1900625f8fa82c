"""The on-disk index: manifest, shard plan, resumable shards, scanning, export."""

from typing import TYPE_CHECKING

from vestige.lazy import lazy_names

if TYPE_CHECKING:
    from vestige.indexes._build import (
        CompressedGradients as CompressedGradients,
        build_index as build_index,
        choose_spec as choose_spec,
        draft_manifest as draft_manifest,
        index as index,
    )
    from vestige.indexes._export import export as export, export_index as export_index
    from vestige.indexes._inputs import (
        Inputs as Inputs,
        batch_memory as batch_memory,
        batch_tokens as batch_tokens,
        read_data as read_data,
        read_inputs as read_inputs,
        tokenising_processes as tokenising_processes,
        tokens_at_most as tokens_at_most,
    )
    from vestige.indexes._manifest import (
        IMPORTED_SPEC as IMPORTED_SPEC,
        PRECONDITIONED as PRECONDITIONED,
        WHOLE_MODEL as WHOLE_MODEL,
        CompressionIdentity as CompressionIdentity,
        DataIdentity as DataIdentity,
        ImportRecord as ImportRecord,
        IndexedComponent as IndexedComponent,
        Manifest as Manifest,
        ModelIdentity as ModelIdentity,
        PlanRecord as PlanRecord,
        Span as Span,
        difference as difference,
        expect_shards as expect_shards,
        lay_out as lay_out,
        publish_manifest as publish_manifest,
        read_manifest as read_manifest,
        require_index as require_index,
    )
    from vestige.indexes._plan import Plan as Plan, fingerprint_rows as fingerprint_rows, plan_index as plan_index
    from vestige.indexes._shards import (
        PART_BYTES as PART_BYTES,
        Expectation as Expectation,
        Marker as Marker,
        ShardContent as ShardContent,
        ShardFile as ShardFile,
        map_shard as map_shard,
        marker_path as marker_path,
        parts_of as parts_of,
        read_marker as read_marker,
        shard_fault as shard_fault,
        shard_path as shard_path,
    )
    from vestige.indexes._store import Index as Index, IndexBlock as IndexBlock, parts_in_order as parts_in_order
    from vestige.indexes._verbatim import VERBATIM as VERBATIM, open_search as open_search
    from vestige.indexes._work import (
        TOKENS as TOKENS,
        TRAINED as TRAINED,
        IndexWork as IndexWork,
        PlannedBatches as PlannedBatches,
        index_status as index_status,
        prepare_index as prepare_index,
        remove_index as remove_index,
        write_rows as write_rows,
    )

__getattr__, __dir__, __all__ = lazy_names(__name__)
