"""Choosing training data: by scores, by gradients or at random, with a reason for every example."""

from vestige.selection._diverse import facility_location as facility_location
from vestige.selection._select import select as select
from vestige.selection._store import Choice as Choice, SelectedData as SelectedData
