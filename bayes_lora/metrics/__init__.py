"""Metrics of predictions, from arrays, and plots."""
