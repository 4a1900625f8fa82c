"""Run directories: the meaning of scores, their summaries, writing and reading. Imports no torch."""

from vestige.runs._audit import (
    Audit as Audit,
    EvidenceRow as EvidenceRow,
    EvidenceTable as EvidenceTable,
    write_audit as write_audit,
)
from vestige.runs._audit_curves import (
    Exposed as Exposed,
    agreement as agreement,
    exposed as exposed,
    group_of as group_of,
    roc_curve as roc_curve,
)
from vestige.runs._audit_record import (
    CHANCE_BITS as CHANCE_BITS,
    AuditRecord as AuditRecord,
    BankRecord as BankRecord,
    CanaryRecord as CanaryRecord,
    JudgementRecord as JudgementRecord,
    LayerRecord as LayerRecord,
    MeasureRecord as MeasureRecord,
    RateRecord as RateRecord,
    Span as Span,
    SubjectRecord as SubjectRecord,
    Truth as Truth,
    is_audit as is_audit,
    low_stands_out as low_stands_out,
    read_audit_record as read_audit_record,
)
from vestige.runs._dense import DenseFile as DenseFile, id_array as id_array, open_dense as open_dense
from vestige.runs._digests import file_faults as file_faults
from vestige.runs._environment import environment as environment
from vestige.runs._evidence import (
    evidence_table as evidence_table,
    read_evidence as read_evidence,
    write_evidence as write_evidence,
)
from vestige.runs._listing import (
    ComponentScore as ComponentScore,
    ScoreRow as ScoreRow,
    ScoreTable as ScoreTable,
    SelfInfluence as SelfInfluence,
    TokenScore as TokenScore,
)
from vestige.runs._read_table import read_run_table as read_run_table, turns_of as turns_of
from vestige.runs._record import (
    RECORD_FILE as RECORD_FILE,
    Check as Check,
    CheckpointRecord as CheckpointRecord,
    CoverageRecord as CoverageRecord,
    DataRecord as DataRecord,
    DistributionRecord as DistributionRecord,
    GroupRecord as GroupRecord,
    ModelRecord as ModelRecord,
    RunRecord as RunRecord,
    SkippedRecord as SkippedRecord,
    TrustRecord as TrustRecord,
    Verdict as Verdict,
    describe_data as describe_data,
    describe_model as describe_model,
    describe_process as describe_process,
    is_run as is_run,
    make_run_record as make_run_record,
    read_record as read_record,
)
from vestige.runs._sample import sampled_rows as sampled_rows
from vestige.runs._scores import Scores as Scores
from vestige.runs._summary import ScoreCollector as ScoreCollector, ScoreSummary as ScoreSummary
from vestige.runs._tables import ComponentScores as ComponentScores, TokenScores as TokenScores
from vestige.runs._topk import End as End, RankedScore as RankedScore, TopK as TopK
from vestige.runs._types import Meaning as Meaning, ScoreBlock as ScoreBlock
from vestige.runs._write import RunTables as RunTables, check_target as check_target, write_run as write_run
