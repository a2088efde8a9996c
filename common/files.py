"""Files appear whole or not at all: write beside, flush, rename."""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import socket

from common.config import UserError

_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:12]


@contextlib.contextmanager
def atomic_file(path):
    """Yield a temporary name in `path`'s folder; on success flush it and rename it to `path`.

    The folder is made where absent. Raises UserError where the folder or the file cannot be written
    (no permission, disk full): the file that was at `path` before is then still there, whole.
    """
    folder, name = os.path.split(os.path.abspath(path))
    # The suffix stays the last part: numpy and matplotlib choose their format by it.
    stem, suffix = os.path.splitext(name)
    # Another process of this number may write here, too: on another machine, in a container.
    unique = f"{_HOST}-{os.getpid()}-{secrets.token_hex(4)}"
    temporary = os.path.join(folder, f".{stem}.{unique}.tmp{suffix}")
    try:
        os.makedirs(folder, exist_ok=True)
        _remove_left_behind(folder, stem, suffix)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space there" if full else "make it writable"
        raise UserError(
            f"cannot write {path}: {reason}; {advice} or choose another folder"
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


def _remove_left_behind(folder, stem, suffix):
    # A killed process cannot remove its temporary file; the next writer of the same name on its
    # machine does.
    start, end = re.escape(f".{stem}.{_HOST}-"), re.escape(f".tmp{suffix}")
    pattern = re.compile(start + r"(\d+)-\w+" + end)
    for name in os.listdir(folder):
        match = pattern.fullmatch(name)
        if match and not _is_running(int(match[1])):
            with contextlib.suppress(OSError):
                os.remove(os.path.join(folder, name))


def _is_running(pid):
    if os.name == "nt":
        return True  # there, signal 0 would not ask but interrupt
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
