"""Files, seeds and progress bars."""
