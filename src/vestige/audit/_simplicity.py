"""How well models predict an example whether or not they were trained on it."""

import numpy as np
from jaxtyping import Bool, Float

from vestige.audit._counterfactual import side_means


def simplicity(
    values: Float[np.ndarray, "member example"], membership: Bool[np.ndarray, "member example"]
) -> Float[np.ndarray, "example"]:
    """Return the mean value of the models trained on an example plus that of the others; high is easy.

    Arguments as in `counterfactual`, of which it is the other half: the same two means, added up. NaN where one of the
    two sides has no model.
    """
    inside, outside = side_means(values, membership)
    return inside + outside
