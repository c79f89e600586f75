"""The language model: LoRA sites, scores, features, generation."""
