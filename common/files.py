"""Files appear whole or not at all: write beside, flush, rename."""

import contextlib
import glob
import hashlib
import os
import re
import secrets
import tempfile
import time

from common import UserError

LARGE = 2**30  # bytes of images above which they stay in their file


@contextlib.contextmanager
def atomic_file(path):
    """Yield a temporary name in `path`'s folder; on success flush it and rename it to `path`.

    The folder is made where absent. Raises UserError where the folder or the file cannot be written
    (no permission, disk full): the file that was at `path` before is then still there, whole.
    """
    folder, name = os.path.split(os.path.abspath(path))
    stem, suffix = os.path.splitext(name)  # numpy and matplotlib choose their format by the suffix
    start, end = os.path.join(folder, f".{stem}."), f".tmp{suffix}"
    temporary = f"{start}{secrets.token_hex(6)}{end}"
    try:
        os.makedirs(folder, exist_ok=True)
        for left_behind in glob.glob(f"{glob.escape(start)}*{glob.escape(end)}"):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                if time.time() - os.path.getmtime(left_behind) > 3600:  # by a killed process
                    os.remove(left_behind)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        _replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; make it writable, close the program "
            "that has it open, free some space there or choose another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def _replace(source, path):
    """Rename a file; Windows refuses while a program, a virus scanner perhaps, has `path` open."""
    for seconds in (0.1, 0.4, 1.5):
        with contextlib.suppress(PermissionError):
            return os.replace(source, path)
        time.sleep(seconds)
    os.replace(source, path)


def require_writable(folder):
    """Make the folder; raise UserError where no file can be written into it."""
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}; name another") from error


def require_file_name(name, what):
    """Raise UserError where a name cannot be one of a file on every system."""
    odd = re.search(r'[<>:"/\\|?*\x00-\x1f]', name)
    if odd or name in ("", ".", "..") or len(name.encode()) > 200:
        how = 'pass a plain name, without any of < > : " / \\ | ? *'
        raise UserError(f"{name!r} is not the name of {what}; {how}")


def write_text(path, text):
    """Write `text` to `path` in one piece, as UTF-8. Raises UserError like `atomic_file`."""
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)


def sha256(path):
    """Return the SHA-256 of a file's bytes in hexadecimal. Raises OSError as `open` does."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()
