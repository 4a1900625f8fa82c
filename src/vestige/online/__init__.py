"""Attribution while a model trains: scores from the step's own backward pass, a log, selection of data."""

from typing import TYPE_CHECKING

from vestige.lazy import lazy_names

if TYPE_CHECKING:
    from vestige.online._engine import OnlineAttribution as OnlineAttribution
    from vestige.online._log import (
        InRunInfluence as InRunInfluence,
        OnlineLog as OnlineLog,
        StepLog as StepLog,
        read_steps as read_steps,
        read_table as read_table,
        write_in_run_influence as write_in_run_influence,
    )
    from vestige.online._optimizers import (
        Rule as Rule,
        ScoreOptimizer as ScoreOptimizer,
        read_rule as read_rule,
        unwrap_optimizer as unwrap_optimizer,
    )
    from vestige.online._step import Step as Step, StepScores as StepScores
    from vestige.online._trainer import (
        ID_KEY as ID_KEY,
        Attached as Attached,
        CarriedIds as CarriedIds,
        CollatorWithIds as CollatorWithIds,
        RowsWithIds as RowsWithIds,
        attach as attach,
    )
    from vestige.online._validation import (
        Selected as Selected,
        greedy_selection as greedy_selection,
        quietly as quietly,
        restore_randomness as restore_randomness,
    )

__getattr__, __dir__, __all__ = lazy_names(__name__)
