"""The library on a simulated device, in a process of its own: a device that torch knows of changes other tests.

Autograd starts threads for it, after which no process can be forked; and Accelerate would choose it.
"""

import os
import subprocess
import sys
from pathlib import Path


def test_everything_runs_on_a_simulated_device_as_on_the_cpu():
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    tests = Path(__file__).with_name("on_simulated_device.py")
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--tb=short", str(tests)]
    done = subprocess.run(words, env=own, cwd=tests.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout
