"""`vestige doctor`."""

import sys

from vestige.registry import command
from vestige.settings import DoctorSettings
from vestige.terminal import say

SOMETHING_BAD = 1


@command("doctor", DoctorSettings, function="vestige.checks:doctor", order=10)
def doctor(settings: DoctorSettings) -> None:
    """Say whether it will work, what it covers, and what it will cost.

    Tries the model and the data with the settings that `vestige index` would get, and changes nothing. Ends with
    status 1 when something is bad.
    """
    from vestige.checks import doctor as examine

    report = examine(**settings.arguments())
    say(report)
    if not report.ok:
        sys.exit(SOMETHING_BAD)
