"""Linear datamodeling scores on handwritten digits."""
