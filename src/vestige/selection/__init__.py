"""Choosing training data: by scores, by gradients or at random, with a reason for every example."""

from typing import TYPE_CHECKING

from vestige.lazy import lazy_names

if TYPE_CHECKING:
    from vestige.selection._inputs import open_scores as open_scores
    from vestige.selection._orders import (
        facility_location as facility_location,
        order_by_gumbel as order_by_gumbel,
        order_round_robin as order_round_robin,
        uniforms as uniforms,
    )
    from vestige.selection._select import select as select
    from vestige.selection._store import (
        Choice as Choice,
        SelectedData as SelectedData,
        read_record as read_record,
        require_selection as require_selection,
    )

__getattr__, __dir__, __all__ = lazy_names(__name__)
