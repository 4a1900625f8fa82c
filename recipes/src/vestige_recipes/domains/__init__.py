"""Which domains of text made a model toxic, biased or truthful."""
