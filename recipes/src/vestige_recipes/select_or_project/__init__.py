"""A few components of the gradient, or a projection of all of it."""
