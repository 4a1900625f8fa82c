"""Training runs that attribution and audit can read: Vestige's own, and records of a Trainer's; the early alarm."""

from vestige.train._alarm import Alarm as Alarm
from vestige.train._alarm import Trigger as Trigger
from vestige.train._recorder import Recorder as Recorder
from vestige.train._rows import members_of as members_of
from vestige.train._store import TrainingRun as TrainingRun
from vestige.train._train import train as train
from vestige.train._train import train_loaded as train_loaded
