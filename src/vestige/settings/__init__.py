"""Settings of every command, defined once for the Python functions, the command line and the config files.

A field is the argument of the Python function, the key in `--config run.yaml` and, with dashes, the flag of the
command; its description is the help text. The lowest package but for the errors; nothing in it imports torch, so that
help and mistakes answer at once.
"""

from typing import TYPE_CHECKING

from vestige.lazy import lazy_names

if TYPE_CHECKING:
    from vestige.settings._attribute import (
        AscentOptimizer as AscentOptimizer,
        AttributeSettings as AttributeSettings,
        DoctorSettings as DoctorSettings,
        IndexSettings as IndexSettings,
        PreconditionSettings as PreconditionSettings,
        UntracSettings as UntracSettings,
    )
    from vestige.settings._audit import AuditSettings as AuditSettings, BankValue as BankValue
    from vestige.settings._base import (
        BAD_TEXT as BAD_TEXT,
        Basic as Basic,
        Common as Common,
        Input as Input,
        Named as Named,
        OnBadText as OnBadText,
        OnlyWith as OnlyWith,
        Settings as Settings,
        flag as flag,
        nearest as nearest,
    )
    from vestige.settings._evaluate import (
        ComponentsSettings as ComponentsSettings,
        LdsSettings as LdsSettings,
        MislabelSettings as MislabelSettings,
        OverlapSettings as OverlapSettings,
        RandomisationSettings as RandomisationSettings,
        RemovalSettings as RemovalSettings,
        RetrievalSettings as RetrievalSettings,
        ScoredSettings as ScoredSettings,
        SelectionSettings as SelectionSettings,
        SketchSettings as SketchSettings,
        SourcesSettings as SourcesSettings,
        TailPatchSettings as TailPatchSettings,
        TruthValue as TruthValue,
    )
    from vestige.settings._results import (
        CancelSettings as CancelSettings,
        CompletionSettings as CompletionSettings,
        DemoSettings as DemoSettings,
        ExportSettings as ExportSettings,
        MeasuresSettings as MeasuresSettings,
        MethodsSettings as MethodsSettings,
        PreparationSettings as PreparationSettings,
        ReportSettings as ReportSettings,
        SelectSettings as SelectSettings,
        SplitSettings as SplitSettings,
        StatusSettings as StatusSettings,
        TokenizeSettings as TokenizeSettings,
        ViewSettings as ViewSettings,
    )
    from vestige.settings._run import describe_arguments as describe_arguments, with_settings as with_settings
    from vestige.settings._shared import (
        SHARED_COMPRESSION as SHARED_COMPRESSION,
        BankFolder as BankFolder,
        CompressionSettings as CompressionSettings,
        DataName as DataName,
        IndexFolder as IndexFolder,
        LaunchSettings as LaunchSettings,
        LearningSettings as LearningSettings,
        MemberSettings as MemberSettings,
        ModelName as ModelName,
        Options as Options,
        Precision as Precision,
        QueriesName as QueriesName,
        QuestionSettings as QuestionSettings,
        ReadingSettings as ReadingSettings,
        Reduction as Reduction,
        RunFolder as RunFolder,
        Scope as Scope,
        TokenizerName as TokenizerName,
        TrainedOn as TrainedOn,
    )
    from vestige.settings._train import (
        BankSettings as BankSettings,
        FixSettings as FixSettings,
        TrainSettings as TrainSettings,
        list_epochs as list_epochs,
    )

__getattr__, __dir__, __all__ = lazy_names(__name__)
