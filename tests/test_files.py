"""Files appear whole or not at all, and nothing temporary stays behind."""

import hashlib
import os
import subprocess
import sys

import pytest

from common import files
from common.config import UserError
from common.files import atomic_file, sha256, write_text


def dead_process_id():
    """The number of a process that has just ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def write_and_fail(path, error):
    with atomic_file(path) as temporary:
        with open(temporary, "w") as file:
            file.write("half of the new")
        raise error


def test_the_file_appears_only_at_the_end(tmp_path):
    path = tmp_path / "numbers.txt"
    with atomic_file(path) as temporary:
        with open(temporary, "w") as file:
            file.write("1 2 3")
        assert not path.exists()
    assert path.read_text() == "1 2 3"
    assert os.listdir(tmp_path) == ["numbers.txt"]


def test_the_temporary_name_lies_in_the_same_folder_and_keeps_the_suffix(tmp_path):
    with atomic_file(tmp_path / "array.npz") as temporary:
        assert os.path.dirname(temporary) == str(tmp_path)
        assert temporary.endswith(".npz") and os.path.basename(temporary) != "array.npz"
        open(temporary, "w").close()


def test_who_reads_the_old_file_meanwhile_reads_it_whole(tmp_path):
    path = tmp_path / "numbers.txt"
    path.write_text("the old, which is longer")
    with open(path, "rb", buffering=0) as reader:
        assert reader.read(7) == b"the old"
        write_text(path, "the new")
        assert reader.read() == b", which is longer"
    assert path.read_text() == "the new"


@pytest.mark.parametrize("error", [ValueError("bad number"), KeyboardInterrupt(), MemoryError()])
def test_an_exception_leaves_the_old_file_whole(tmp_path, error):
    path = tmp_path / "numbers.txt"
    path.write_text("the old")
    with pytest.raises(type(error)):
        write_and_fail(path, error)
    assert path.read_text() == "the old"
    assert os.listdir(tmp_path) == ["numbers.txt"]


def test_an_exception_leaves_nothing_where_nothing_was(tmp_path):
    with pytest.raises(ValueError):
        write_and_fail(tmp_path / "numbers.txt", ValueError())
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_one_message_and_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "numbers.txt"
    path.write_text("the old")
    with pytest.raises(UserError) as caught:
        write_and_fail(path, OSError(28, "No space left on device"))
    for part in (str(path), "No space left on device", "folder"):
        assert part in str(caught.value)
    assert path.read_text() == "the old" and os.listdir(tmp_path) == ["numbers.txt"]


def test_missing_folders_are_made(tmp_path):
    write_text(tmp_path / "a" / "b" / "note.txt", "hello")
    assert (tmp_path / "a" / "b" / "note.txt").read_text() == "hello"


def test_a_folder_that_cannot_be_is_one_message(tmp_path):
    (tmp_path / "taken").write_text("a file where a folder is needed")
    path = tmp_path / "taken" / "note.txt"
    with pytest.raises(UserError) as caught:
        write_text(path, "hello")
    assert str(path) in str(caught.value) and "choose another folder" in str(caught.value)
    assert (tmp_path / "taken").read_text() == "a file where a folder is needed"


def test_a_folder_in_the_files_place_is_one_message(tmp_path):
    (tmp_path / "note.txt").mkdir()
    with pytest.raises(UserError, match="note.txt"):
        write_text(tmp_path / "note.txt", "hello")
    assert os.listdir(tmp_path) == ["note.txt"]


def left_behind_by(process_id, path):
    """The temporary file that a process with this number leaves if it is killed writing `path`."""
    with atomic_file(path) as temporary:
        open(temporary, "w").close()
        name = temporary.replace(f"-{os.getpid()}-", f"-{process_id}-")
    with open(name, "w") as file:
        file.write("half")
    return name


def test_what_a_dead_process_left_behind_is_removed(tmp_path):
    left = left_behind_by(dead_process_id(), tmp_path / "note.txt")
    write_text(tmp_path / "note.txt", "hello")
    assert not os.path.exists(left)
    assert os.listdir(tmp_path) == ["note.txt"]


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    in_use = left_behind_by(os.getppid(), tmp_path / "note.txt")
    write_text(tmp_path / "note.txt", "hello")
    assert os.path.exists(in_use)


def test_what_a_process_on_another_machine_writes_is_left_alone(tmp_path, monkeypatch):
    in_use = left_behind_by(dead_process_id(), tmp_path / "note.txt")
    monkeypatch.setattr(files, "_HOST", "elsewhere")
    write_text(tmp_path / "note.txt", "hello")
    assert os.path.exists(in_use)


def test_two_writers_never_share_a_temporary_file(tmp_path):
    with atomic_file(tmp_path / "note.txt") as first:
        open(first, "w").close()
        with atomic_file(tmp_path / "note.txt") as second:
            open(second, "w").close()
            assert first != second


def test_other_files_of_the_folder_are_left_alone(tmp_path):
    process_id = dead_process_id()
    others = [
        left_behind_by(process_id, tmp_path / "other.txt"),
        tmp_path / "note.txt.bak",
        tmp_path / f".note.{process_id}.tmp.npz",
        tmp_path / ".note.x.tmp.txt",
    ]
    for path in others[1:]:
        path.write_text("mine")
    write_text(tmp_path / "note.txt", "hello")
    assert all(os.path.exists(path) for path in others)


def test_text_is_written_as_utf8(tmp_path):
    write_text(tmp_path / "note.txt", "± 5 %, Γ\n")
    assert (tmp_path / "note.txt").read_bytes() == b"\xc2\xb1 5 %, \xce\x93\n"


def test_a_path_in_the_current_folder_needs_no_folder_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text("note.txt", "hello")
    assert os.listdir(tmp_path) == ["note.txt"]


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"abc" * 100_000)
    assert sha256(tmp_path / "file") == hashlib.sha256(b"abc" * 100_000).hexdigest()
    with pytest.raises(OSError):
        sha256(tmp_path / "no such file")
