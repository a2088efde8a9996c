"""Files appear whole or not at all: write beside, flush, rename."""

import contextlib
import glob
import hashlib
import os
import secrets
import time

from common import UserError


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
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; make it writable, free some space "
            "there or choose another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def write_text(path, text):
    """Write `text` to `path` in one piece, as UTF-8. Raises UserError like `atomic_file`."""
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)


def sha256(path):
    """Return the SHA-256 of a file's bytes in hexadecimal. Raises OSError as `open` does."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()
