from io import StringIO

import pytest
from rich.console import Console

from bayes_lora.utils.progress import bars


@pytest.fixture
def log():
    """Progress in a log of 20 columns, a clock to set, and the log's lines."""
    file, clock = StringIO(), [0.0]
    with bars(Console(file=file, width=20)) as progress:
        progress.get_time = lambda: clock[0]
        yield progress, clock, lambda: file.getvalue().splitlines()
    assert file.getvalue().endswith("\n") and "\x1b" not in file.getvalue()


def test_a_log_gets_a_line_for_each_tenth_with_the_time_left(log):
    progress, clock, lines = log
    bar = progress.add_task("meta-learning", total=70)
    assert lines() == []
    for step in range(1, 71):
        clock[0] = 2.0 * step
        progress.update(bar, completed=step, description=f"meta-learning, loss {step}")
        assert len(lines()) == step // 7
    assert lines()[0] == "meta-learning, loss 7: 7/70, 0:00:14, 0:02:06 left"
    assert lines()[-1] == "meta-learning, loss 70: 70/70, 0:02:20"
    progress.update(bar, total=70, completed=70)
    assert len(lines()) == 10


def test_a_log_gets_a_line_every_half_minute_of_slow_work(log):
    progress, clock, lines = log
    bar = progress.add_task("slow [/x]", total=1000)
    for step in range(1, 5):
        clock[0] = 20.0 * step
        progress.advance(bar)
    assert lines() == ["slow [/x]: 2/1000, 0:00:40, 5:32:40 left", "slow [/x]: 4/1000, 0:01:20, 5:32:00 left"]


def test_what_was_done_before_counts_for_no_speed(log):
    progress, clock, lines = log
    bar = progress.add_task("resumed", total=100, completed=50)
    clock[0] = 10.0
    progress.update(bar, advance=10)
    progress.update(bar, total=60)  # ended early
    assert lines() == ["resumed: 60/100, 0:00:10, 0:00:40 left", "resumed: 60/60, 0:00:10"]
    progress.update(progress.add_task("of a run that is done", total=6, completed=6), completed=6)
    assert len(lines()) == 2


def test_a_terminal_gets_bars():
    file = StringIO()
    with bars(Console(file=file, force_terminal=True, width=100)) as progress:
        progress.update(progress.add_task("reading", total=3), completed=3)
    assert "━" in file.getvalue() and "3/3" in file.getvalue()


def test_an_error_adds_no_line():
    file = StringIO()
    with pytest.raises(ValueError), bars(Console(file=file)) as progress:
        progress.add_task("reading", total=3)
        raise ValueError
    assert file.getvalue() == ""
