"""Run directories: the meaning of scores, their summaries, writing and reading. Imports no torch."""

from typing import TYPE_CHECKING

from vestige.lazy import lazy_names

if TYPE_CHECKING:
    from vestige.runs._audit import (
        PREFERRED as PREFERRED,
        Audit as Audit,
        EvidenceRow as EvidenceRow,
        evidence_table as evidence_table,
        judgement_table as judgement_table,
        read_evidence as read_evidence,
        write_evidence as write_evidence,
    )
    from vestige.runs._audit_record import (
        AUDIT_FORMAT as AUDIT_FORMAT,
        CHANCE_BITS as CHANCE_BITS,
        AuditRecord as AuditRecord,
        BankRecord as BankRecord,
        CanaryRecord as CanaryRecord,
        ContaminationRecord as ContaminationRecord,
        EpsilonRecord as EpsilonRecord,
        FindingRecord as FindingRecord,
        InflationRecord as InflationRecord,
        JudgementRecord as JudgementRecord,
        LayerRecord as LayerRecord,
        MeasureRecord as MeasureRecord,
        NextRecord as NextRecord,
        RateRecord as RateRecord,
        Span as Span,
        SubjectRecord as SubjectRecord,
        Truth as Truth,
        UsageRecord as UsageRecord,
        agreement as agreement,
        format_span as format_span,
        group_of as group_of,
        is_audit as is_audit,
        low_stands_out as low_stands_out,
        mean_exposures as mean_exposures,
        read_audit_record as read_audit_record,
        roc_curve as roc_curve,
    )
    from vestige.runs._conclusion import Conclusion as Conclusion, Conflict as Conflict, conclude as conclude
    from vestige.runs._dense import (
        DenseFile as DenseFile,
        id_array as id_array,
        open_dense as open_dense,
        write_dense as write_dense,
    )
    from vestige.runs._folder import (
        file_faults as file_faults,
        is_complete as is_complete,
        is_run as is_run,
        kind_of as kind_of,
        read_known as read_known,
        read_record as read_record,
        require_run as require_run,
    )
    from vestige.runs._groups import (
        NO_SOURCE as NO_SOURCE,
        SourceLift as SourceLift,
        find_source_lift as find_source_lift,
    )
    from vestige.runs._listed import (
        ScoreRow as ScoreRow,
        relative_strength as relative_strength,
    )
    from vestige.runs._plot import draw_ranking as draw_ranking
    from vestige.runs._proofs import (
        Proofs as Proofs,
        StatedRow as StatedRow,
        VerbatimSpan as VerbatimSpan,
    )
    from vestige.runs._record import (
        DENSE_FILE as DENSE_FILE,
        FIRST_RUNG as FIRST_RUNG,
        PARTS as PARTS,
        RECORD_FILE as RECORD_FILE,
        RUN_FORMAT as RUN_FORMAT,
        Check as Check,
        CheckpointRecord as CheckpointRecord,
        CoverageRecord as CoverageRecord,
        DataRecord as DataRecord,
        LadderRecord as LadderRecord,
        Meaning as Meaning,
        ModelRecord as ModelRecord,
        Part as Part,
        RungRecord as RungRecord,
        RunRecord as RunRecord,
        SkippedRecord as SkippedRecord,
        TrustRecord as TrustRecord,
        Verdict as Verdict,
        describe_process as describe_process,
        environment as environment,
    )
    from vestige.runs._scores import Scores as Scores
    from vestige.runs._stored import read_ranked as read_ranked, read_run_table as read_run_table
    from vestige.runs._summary import (
        RankedScore as RankedScore,
        ScoreBlock as ScoreBlock,
        ScoreCollector as ScoreCollector,
        ScoreSummary as ScoreSummary,
        TopK as TopK,
        sample_rows as sample_rows,
    )
    from vestige.runs._tables import (
        ComponentScores as ComponentScores,
        RunTables as RunTables,
        TokenScores as TokenScores,
        token_texts as token_texts,
    )
    from vestige.runs._words import (
        SYSTEM_ROLES as SYSTEM_ROLES,
        Listed as Listed,
        Question as Question,
        Wording as Wording,
    )
    from vestige.runs._write import (
        add_part as add_part,
        check_target as check_target,
        describe_model as describe_model,
        find_unfinished as find_unfinished,
        make_run_record as make_run_record,
        write_audit as write_audit,
        write_run as write_run,
    )

__getattr__, __dir__, __all__ = lazy_names(__name__)
