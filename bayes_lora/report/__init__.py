"""A report of run folders as one HTML file, which needs neither a language model nor a network."""
