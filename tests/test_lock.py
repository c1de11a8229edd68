"""The lock of a bundle: one writer, a clear error for the second, nothing left of the dead."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tightrope.errors import BundleError
from tightrope.lock import NAME, check_unlocked, locked

HOLD = """
import sys, pathlib, tightrope.lock
with tightrope.lock.locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_is_refused_and_a_dead_one_blocks_nobody(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(BundleError, match="another command is writing"), locked(tmp_path):
            raise AssertionError("both have the lock")
        with pytest.raises(BundleError, match="another command is writing"):
            check_unlocked(tmp_path)
        holder.kill()
    assert (tmp_path / NAME).exists()  # left by the dead
    check_unlocked(tmp_path)
    with locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_the_lock_goes_with_what_was_locked(tmp_path: Path) -> None:
    check_unlocked(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="work"), locked(tmp_path):
        with pytest.raises(BundleError, match="another command"):
            check_unlocked(tmp_path)
        raise ValueError("work")
    assert not list(tmp_path.iterdir())
