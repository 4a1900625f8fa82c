"""What a model and its data would give, tried on a few examples before any long work; writes nothing."""

from vestige.checks._doctor import doctor as doctor
from vestige.checks._types import (
    Check as Check,
    Cost as Cost,
    Coverage as Coverage,
    DoctorReport as DoctorReport,
    Verdict as Verdict,
)
