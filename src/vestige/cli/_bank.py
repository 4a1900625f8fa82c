"""`vestige bank`."""

from vestige.registry import command
from vestige.settings import BankSettings
from vestige.terminal import say


@command("bank", BankSettings, function="vestige.banks:bank", order=50, sweepable=True)
def bank(settings: BankSettings) -> None:
    """Train many models on parts of the data, and store what each makes of every example and query.

    Without a way of leaving out, the parts are random subsets. Interrupted at any moment, the same command continues;
    more --subsets or --seeds extend the bank; with other settings it is refused, with the difference shown.
    """
    from vestige.banks import bank as build

    made = build(**settings.arguments())
    say(f"{settings.out}: {made!r}, id {made.id}")
