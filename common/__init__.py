"""What the scripts share: data, episodes, encoders, and the bookkeeping around a step."""

import os
import re
import shlex
import subprocess
import unicodedata

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the project's folder


class UserError(Exception):
    """Something the user can put right. The message is one line: found, needed, what to do."""

    def __init__(self, message):
        # A library's own words, quoted in the message, may run over several lines.
        super().__init__(" ".join(line.strip() for line in str(message).splitlines()))


def first_line(error):
    """Return the first line of an error's message, or its class where it has none."""
    lines = re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip().splitlines()  # no terminal's colours
    line = lines[0] if lines else type(error).__name__
    line += f" {lines[1].strip()}" if line.endswith(":") and lines[1:] else ""
    return line if len(line) <= 300 else f"{line[:300]}..."


def shown(name):
    """Return a name as text that can be compared, printed and written: NFC, nothing unprintable.

    A file's name may hold any bytes, and macOS writes an accented letter as two characters.
    """
    text = unicodedata.normalize("NFC", str(name)).encode(errors="backslashreplace").decode()
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ufffe\uffff]", lambda odd: ascii(odd[0])[1:-1], text)


def shell_command(*words):
    """Return a command as it is typed: with quotation marks where the system's shell needs them."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def script_command(script, *options):
    """Return the command that calls a script of the project, from whatever folder this one was."""
    there = os.path.abspath(script) == os.path.join(ROOT, script)
    return shell_command("python", script if there else os.path.join(ROOT, script), *options)
