"""Scoring what a model answers."""
