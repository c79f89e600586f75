"""Inference: objectives, effect handlers, plates, training."""
