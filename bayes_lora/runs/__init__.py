"""Jobs that write a folder: fits, comparisons, sweeps and the demo."""
