"""The command line: parses arguments, runs a job and prints its results."""
