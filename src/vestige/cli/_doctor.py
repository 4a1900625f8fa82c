"""`vestige doctor`."""

from vestige.cli._command import command
from vestige.settings import DoctorSettings


@command(DoctorSettings)
def doctor(settings: DoctorSettings) -> None:
    """Say whether it will work, what it covers, and what it will cost.

    Tries the model and the data with the settings that `vestige index` would get, and changes nothing.
    """
    from vestige.doctor import doctor as examine

    print(examine(**settings.arguments()))
