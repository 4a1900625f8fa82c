"""Attribution while a model trains: scores from the step's own backward pass, a log, selection of data."""

from vestige.online._engine import OnlineAttribution as OnlineAttribution
from vestige.online._log import InRunInfluence as InRunInfluence, OnlineLog as OnlineLog
from vestige.online._run import write_in_run_influence as write_in_run_influence
from vestige.online._select import Selected as Selected, greedy_selection as greedy_selection
from vestige.online._step import Step as Step, StepScores as StepScores
from vestige.online._trainer import (
    ID_KEY as ID_KEY,
    Attached as Attached,
    CollatorWithIds as CollatorWithIds,
    RowsWithIds as RowsWithIds,
    VestigeCallback as VestigeCallback,
    attach as attach,
)
from vestige.online._validation import quietly as quietly
