"""Metrics of predictions, computed from tensors, and plots."""
