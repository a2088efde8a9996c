"""A script's start and end: command line in, exit code out, one line for an error."""

import inspect
import io
import os
import sys
import threading

from common.config import UserError, changed_values, first_line, parse_config
from common.parallel import is_first, is_first_to_fail, process_count


def run_script(main, config_class, recipes=None):
    """Read the command line, call `main(cfg)` and leave with its exit code (2 after an error).

    recipes: {name: {field: value}} for `--recipe=name`, if the class has a field of that name.
    What a library refuses (a value out of its range, memory that is not there) ends in one line,
    too; with `python -X dev` it keeps its traceback. Of several processes the first one prints, and
    an error is printed by the process that meets it first.
    """
    script = os.path.basename(sys.argv[0])
    if not is_first():
        sys.stdout = open(os.devnull, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a class may be named in any script
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        doc = inspect.getmodule(main).__doc__
        cfg = parse_config(config_class, sys.argv[1:], script, doc, recipes)
        for line in changed_values(cfg):
            print(line)
        code = main(cfg) or 0
    except KeyboardInterrupt:
        code = _fail(f"{script}: stopped; what was saved before is intact", 130)
    except (UserError, RuntimeError, ValueError, OverflowError, MemoryError, OSError) as error:
        if sys.flags.dev_mode and not isinstance(error, UserError):
            raise
        hint = "" if isinstance(error, UserError) else f"; python -X dev {script} ... shows where"
        code = _fail(f"{script}: error: {_one_line(error)}{hint}", 2)
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    if code and (process_count() > 1 or any(not thread.daemon for thread in others)):
        # Python would wait for the threads until they finish, an adaptation of a minute perhaps,
        # and torch.distributed for processes that have ended.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _fail(message, code):
    try:
        sys.stdout.flush()
    except OSError:  # its disk is full, or whoever read it has gone: Python would try again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if is_first_to_fail():
        print(message, file=sys.stderr)
    return code


def _one_line(error):
    """Return an error's message in one line; a library's own error is named by its class."""
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {first_line(error)}"
