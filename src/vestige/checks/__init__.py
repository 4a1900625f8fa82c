"""What a model and its data would give, tried on a few examples before any long work; writes nothing."""

from typing import TYPE_CHECKING

from vestige.lazy import lazy_names

if TYPE_CHECKING:
    from vestige.checks._doctor import (
        ALTERNATIVES as ALTERNATIVES,
        Trial as Trial,
        check_batches as check_batches,
        check_disk_space as check_disk_space,
        check_memory as check_memory,
        check_time as check_time,
        doctor as doctor,
        estimate_costs as estimate_costs,
        try_batch as try_batch,
    )
    from vestige.checks._gradients import check_slope as check_slope, measure_slope as measure_slope
    from vestige.checks._inputs import (
        PROBE_TOKENS as PROBE_TOKENS,
        choose_probes as choose_probes,
        cut_examples as cut_examples,
        pad_examples as pad_examples,
    )
    from vestige.checks._report import (
        Check as Check,
        Cost as Cost,
        Coverage as Coverage,
        DoctorReport as DoctorReport,
        Verdict as Verdict,
    )

__getattr__, __dir__, __all__ = lazy_names(__name__)
