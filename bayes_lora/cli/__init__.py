"""The command line: parses arguments, calls a job, prints."""
