"""The language model: LoRA sites, scores, features and generation."""
