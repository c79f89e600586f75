"""Distributions over LoRA weights, and operations on their parameters."""
