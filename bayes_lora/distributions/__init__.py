"""Distributions over LoRA weights, and what they share."""
