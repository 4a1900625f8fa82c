"""What a model and its data would give, tried on a few examples before any long work; writes nothing."""

from vestige.doctor._doctor import doctor as doctor
from vestige.doctor._types import Check as Check
from vestige.doctor._types import Cost as Cost
from vestige.doctor._types import Coverage as Coverage
from vestige.doctor._types import DoctorReport as DoctorReport
from vestige.doctor._types import Verdict as Verdict
