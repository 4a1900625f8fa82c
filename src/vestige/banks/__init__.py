"""The bank: models trained on subsets of the data, the ground truth that scores are judged by."""

from typing import TYPE_CHECKING

from vestige.lazy import lazy_names

if TYPE_CHECKING:
    from vestige.banks._design import (
        EVERYTHING as EVERYTHING,
        Subset as Subset,
        make_design as make_design,
        random_subsets as random_subsets,
        read_lists as read_lists,
        run_seed as run_seed,
        without_each as without_each,
        without_each_source as without_each_source,
        without_one as without_one,
    )
    from vestige.banks._files import (
        BANK_FORMAT as BANK_FORMAT,
        BANK_MEASURES as BANK_MEASURES,
        BankManifest as BankManifest,
        Measured as Measured,
        Member as Member,
        list_subsets as list_subsets,
        open_members as open_members,
        prepare_manifest as prepare_manifest,
        read_manifest as read_manifest,
        remove_bank as remove_bank,
        require_bank as require_bank,
    )
    from vestige.banks._plan import BankWork as BankWork, Run as Run, bank_of as bank_of
    from vestige.banks._store import (
        TRUTH_FORMATS as TRUTH_FORMATS,
        Bank as Bank,
        Measure as Measure,
        Texts as Texts,
        TruthFormat as TruthFormat,
    )

__getattr__, __dir__, __all__ = lazy_names(__name__)
