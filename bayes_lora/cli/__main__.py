"""Run the command line: ``python -m bayes_lora.cli``."""

from bayes_lora.cli.main import main

main()
