"""Files appear whole or not at all, and nothing temporary stays behind."""

import os
import time

import pytest

from common import UserError
from common.files import atomic_file, require_file_name, require_writable, write_text


def left_behind(path, age):
    """The temporary file, `age` seconds old, that a process leaves if it is killed writing path."""
    with atomic_file(path) as temporary:
        open(temporary, "w").close()
    open(temporary, "w").close()
    os.utime(temporary, (time.time() - age, time.time() - age))
    return temporary


@pytest.mark.parametrize("old", [None, "the old, which is longer"])
def test_the_file_appears_only_at_the_end_and_whole(tmp_path, old):
    path = tmp_path / "array.npz"
    if old:
        path.write_text(old)
    with atomic_file(path) as temporary:
        # numpy and matplotlib choose the format by the suffix; a rename needs the same disk.
        assert os.path.dirname(temporary) == str(tmp_path) and temporary.endswith(".npz")
        with open(temporary, "w") as file:
            file.write("the new")
        assert (path.read_text() if path.exists() else None) == old
    assert path.read_text() == "the new" and os.listdir(tmp_path) == ["array.npz"]


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (ValueError("bad number"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(28, "No space left on device"), UserError),
    ],
)
def test_an_exception_leaves_the_folder_as_it_was(tmp_path, error, raised, there):
    path = tmp_path / "numbers.txt"
    if there:
        path.write_text("the old")
    with pytest.raises(raised) as caught, atomic_file(path) as temporary:
        with open(temporary, "w") as file:
            file.write("half of the new")
        raise error
    assert os.listdir(tmp_path) == (["numbers.txt"] if there else [])
    assert not there or path.read_text() == "the old"
    if raised is UserError:
        assert f"cannot write {path}: No space left on device; " in str(caught.value)


def test_text_is_written_as_utf8_into_folders_that_are_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("note.txt", tmp_path / "a" / "b" / "note.txt"):
        write_text(path, "± 5 %, Γ\n")
        with open(path, "rb") as file:
            assert file.read() == b"\xc2\xb1 5 %, \xce\x93\n"


def test_a_path_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "taken").write_text("a file where a folder is needed")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "taken" / "note.txt", tmp_path / "folder"):
        with pytest.raises(UserError, match=f"cannot write {path}: .* choose another folder"):
            write_text(path, "hello")
    assert (tmp_path / "taken").read_text() == "a file where a folder is needed"
    assert sorted(os.listdir(tmp_path)) == ["folder", "taken"]


def test_only_an_old_temporary_file_of_the_same_file_is_removed(tmp_path):
    path = tmp_path / "note.txt"
    others = [left_behind(tmp_path / "other.txt", 5000), left_behind(path, 3000)]
    left = left_behind(path, 5000)
    write_text(path, "hello")
    assert not os.path.exists(left) and all(map(os.path.exists, others))


def test_a_file_that_is_open_elsewhere_for_a_moment_is_replaced_all_the_same(tmp_path, monkeypatch):
    replace, refusals = os.replace, [PermissionError(13, "in use")] * 2

    def busy(source, target):
        if refusals:
            raise refusals.pop()
        replace(source, target)

    monkeypatch.setattr(os, "replace", busy)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new" and not refusals
    refusals += [PermissionError(13, "in use")] * 9
    with pytest.raises(UserError, match="in use; .*close the program that has it open"):
        write_text(tmp_path / "a.txt", "newer")
    assert (tmp_path / "a.txt").read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


def test_whether_a_folder_can_be_written_to_is_known_before(tmp_path):
    require_writable(tmp_path / "new" / "results")
    assert not list((tmp_path / "new" / "results").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        require_writable(tmp_path / "file" / "results")


@pytest.mark.parametrize("name", ["a:b", "a/b", "a\\b", "what?", "a\nb", "..", "", "x" * 201])
def test_a_name_that_is_no_file_name_on_some_system_is_refused(name):
    require_file_name("a b, c'é", "a model")
    with pytest.raises(UserError, match="is not the name of a model; pass a plain name"):
        require_file_name(name, "a model")
