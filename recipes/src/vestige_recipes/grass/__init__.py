"""The evaluation of GraSS on an image classifier and on a model of music."""
