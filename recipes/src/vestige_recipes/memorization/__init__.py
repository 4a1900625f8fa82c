"""What a model has memorized: predicted early, and proved by retraining."""
