"""`vestige fix`: from rows that a run found to a model trained without them, and what that changes.

It trains, asks and writes a page, so it stands above `training`, `methods` and `reports`; `selection` is below them.
Only what needs no torch is imported with the package.
"""

from vestige.fixes._demo import EXAMPLE as EXAMPLE, demo as demo, describe_demo as describe_demo
from vestige.fixes._record import ARMS as ARMS, Answers as Answers, Fix as Fix, Outcome as Outcome
