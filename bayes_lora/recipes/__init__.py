"""Named models, guides and objectives, and their settings."""
