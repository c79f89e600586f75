"""Run the command line: ``bayes-lora``, or ``python -m bayes_lora.cli``."""

import signal


def main() -> None:
    """Run the command line. Ctrl-C while it is imported ends it without a traceback."""
    # Imports take a quarter of a second, and Python's handler raises wherever they are.
    handler = signal.getsignal(signal.SIGINT)
    if handler == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from bayes_lora.cli.main import main as run

    signal.signal(signal.SIGINT, handler)
    run()


if __name__ == "__main__":
    main()
