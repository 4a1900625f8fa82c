"""Linear datamodeling scores of language models."""
