"""Named priors, guides and objectives, and their settings."""
