"""Choosing training data: by scores, by gradients or at random, with a reason for every example."""

from vestige.select._diverse import facility_location as facility_location
from vestige.select._select import select as select
from vestige.select._store import Choice as Choice
from vestige.select._store import SelectedData as SelectedData
