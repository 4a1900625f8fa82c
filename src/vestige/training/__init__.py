"""Training runs that attribution and audit can read: Vestige's own, and records of a Trainer's; the early alarm."""

from typing import TYPE_CHECKING

from vestige.lazy import lazy_names

if TYPE_CHECKING:
    from vestige.training._adjoint import (
        Adjoints as Adjoints,
        Moved as Moved,
        unclip as unclip,
    )
    from vestige.training._alarm import (
        Alarm as Alarm,
        AtRisk as AtRisk,
        Trigger as Trigger,
        answer_codes as answer_codes,
        find_at_risk as find_at_risk,
        write_at_risk as write_at_risk,
    )
    from vestige.training._bank import bank as bank
    from vestige.training._engine import (
        Hook as Hook,
        Recipe as Recipe,
        Rows as Rows,
        Step as Step,
        fit as fit,
        make_model as make_model,
        pad as pad,
    )
    from vestige.training._examples import (
        ALARM_OFF as ALARM_OFF,
        TrainInputs as TrainInputs,
        Watched as Watched,
        measure as measure,
        members_of as members_of,
        only_answers as only_answers,
        read_inputs as read_inputs,
        read_questions as read_questions,
        read_weights as read_weights,
        require_inputs as require_inputs,
        with_weights as with_weights,
    )
    from vestige.training._recorder import Recorder as Recorder
    from vestige.training._replay import (
        Derivatives as Derivatives,
        RecordedStep as RecordedStep,
        Replay as Replay,
    )
    from vestige.training._retraining import (
        CommandTraining as CommandTraining,
        Retraining as Retraining,
        TrainerTraining as TrainerTraining,
    )
    from vestige.training._source import Segment as Segment, unroll as unroll
    from vestige.training._store import (
        TrainingRun as TrainingRun,
        Unfinished as Unfinished,
        require_training as require_training,
        require_trainings as require_trainings,
    )
    from vestige.training._tracking import (
        TRACKERS as TRACKERS,
        Tracked as Tracked,
        Tracker as Tracker,
        report_numbers as report_numbers,
        require_tracker as require_tracker,
    )
    from vestige.training._train import steps_per_epoch as steps_per_epoch, train as train

__getattr__, __dir__, __all__ = lazy_names(__name__)
