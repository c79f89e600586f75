"""Run the command line: ``python -m bayes_lora``, and ``accelerate launch -m bayes_lora`` for several processes."""

from bayes_lora.cli.main import main

main()
