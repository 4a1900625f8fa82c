"""Unlearning beside leaving sources out."""
