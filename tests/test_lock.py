"""The lock of a bundle: one writer, a clear error for the second, nothing left of the dead."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tightrope.errors import BundleError, InputError
from tightrope.lock import NAME, check_unlocked, check_writable, locked

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


def test_a_place_that_can_be_written_is_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path, tmp_path / "a" / "b", Path("a/b"), Path()):
        check_writable(place)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named_with_what_is_in_the_way(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.touch()
    link.symlink_to(tmp_path / "nowhere")
    for place, got in ((file / "a" / "b", f"{file}: Not a directory"), (link / "a", f"{link}: No such file")):
        with pytest.raises(InputError, match=rf"where: +{place}\n +got: +{got}[\s\S]*another --work"):
            check_writable(place, "another --work")
    if sys.platform == "linux":  # of the kernel: nobody can write there
        with pytest.raises(InputError, match="nothing can be written there"):
            check_writable(Path("/proc/none"))
