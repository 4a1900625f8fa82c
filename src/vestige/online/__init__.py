"""Attribution while a model trains: scores from the step's own backward pass, a log, selection of data."""

from vestige.online._engine import OnlineAttribution as OnlineAttribution
from vestige.online._log import InRunInfluence as InRunInfluence
from vestige.online._log import OnlineLog as OnlineLog
from vestige.online._run import write_in_run_influence as write_in_run_influence
from vestige.online._select import Selected as Selected
from vestige.online._select import greedy_selection as greedy_selection
from vestige.online._step import Step as Step
from vestige.online._step import StepScores as StepScores
from vestige.online._trainer import ID_KEY as ID_KEY
from vestige.online._trainer import Attached as Attached
from vestige.online._trainer import CollatorWithIds as CollatorWithIds
from vestige.online._trainer import RowsWithIds as RowsWithIds
from vestige.online._trainer import VestigeCallback as VestigeCallback
from vestige.online._trainer import attach as attach
from vestige.online._validation import quietly as quietly
