"""`disco_trl.evaluation.child`: a child ends with its parent, by whatever signal. All of these are real processes."""

import os
import signal
import subprocess
import sys

import pytest


CHILD = """
import os, threading
from disco_trl.evaluation.child import end_with_parent
end_with_parent()
print("started", flush=True)
threading.Event().wait()
"""
PARENT = f"""
import sys
from disco_trl.evaluation.child import run_child
sys.exit(run_child([sys.executable, "-c", {CHILD!r}], sys.stdout))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_child_ends_with_its_parent(number):
    # A group of its own, as the signal is to reach the parent alone.
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, process_group=0
    ) as parent:
        assert parent.stdout.readline().strip() == "started"
        parent.send_signal(number)
        # Both hold the pipe: its end, which this waits for, comes when both have ended.
        assert parent.communicate(timeout=100)[0] == ""
    assert parent.returncode == -number


def test_a_child_that_ends_by_itself_gives_its_status():
    code = PARENT.replace("threading.Event().wait()", "os._exit(7)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == 7


def test_a_run_of_compare_ends_with_its_input(tmp_path):
    os.mkfifo(tmp_path / "run.json")  # Nobody writes to it, so that the run would wait for its settings for ever.
    command = [sys.executable, "-m", "disco_trl.evaluation.compare_run", str(tmp_path / "run.json")]
    done = subprocess.run([*command, "--until_input_ends"], stdin=subprocess.DEVNULL, capture_output=True)
    assert done.returncode == -signal.SIGKILL
