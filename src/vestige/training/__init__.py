"""Training runs that attribution and audit can read: Vestige's own, and records of a Trainer's; the early alarm."""

from vestige.training._alarm import Alarm as Alarm, Trigger as Trigger
from vestige.training._recorder import Recorder as Recorder
from vestige.training._rows import members_of as members_of
from vestige.training._store import TrainingRun as TrainingRun
from vestige.training._train import train as train, train_loaded as train_loaded
