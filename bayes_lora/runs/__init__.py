"""Jobs that leave a folder: fits, comparisons, sweeps, the demonstration."""
