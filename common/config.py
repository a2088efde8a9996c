"""A script's `Config` from its defaults, a recipe and `--name=value`; its start and its end."""

import contextlib
import dataclasses
import difflib
import inspect
import io
import math
import os
import re
import signal
import sys
import threading
import tokenize
from typing import get_args, get_origin

from common import UserError, first_line
from common.parallel import is_first, is_first_to_fail, process_count


def run_script(main, config_class, recipes=None, torchrun=True):
    """Read the command line, call `main(cfg)` and leave with its exit code.

    recipes: {name: options as on the command line} for `--recipe=name`. torchrun: whether several
    processes can share the work. The code is 2 after an error and 128 + the signal's number after a
    signal that ends a run; either is one line (with `python -X dev` a library's error keeps its
    traceback), printed by the first process, or by the one that meets an error first.
    """
    script, stopped = os.path.basename(sys.argv[0]), "stopped; what was saved before is intact"
    if isinstance(sys.stdout, io.TextIOWrapper):  # class names may use any alphabet
        sys.stdout.reconfigure(errors="backslashreplace")
    for name in ("TERM", "HUP", "USR1", "USR2", "XCPU"):  # clusters' notices; Windows has only TERM
        number = getattr(signal, f"SIG{name}", None)
        if number and signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, _raise_stop)
    try:
        if not is_first():
            sys.stdout = open(os.devnull, "w")
        if process_count() > 1 and not torchrun:
            raise UserError("several processes cannot share its work; start it without torchrun")
        cfg = parse_config(config_class, sys.argv[1:], recipes, inspect.getmodule(main).__doc__)
        if hasattr(cfg, "resume"):
            kept = " --overwrite=false" if getattr(cfg, "overwrite", False) else ""
            stopped += f"; add --resume=auto{kept} to go on after the last whole epoch"
        for line in changed_values(cfg):
            print(line, flush=True)
        code = main(cfg) or 0
    except KeyboardInterrupt as stop:
        code = _fail(f"{script}: {stopped}", 128 + (stop.args or (signal.SIGINT,))[0])
    except (UserError, RuntimeError, ValueError, OverflowError, MemoryError, OSError) as error:
        message = str(error)
        if sys.flags.dev_mode and (error.__cause__ or not isinstance(error, UserError)):
            raise
        if not isinstance(error, UserError):
            message = f"{type(error).__name__}: {first_line(error)}"
            message += f"; python -X dev {script} ... shows where"
        code = _fail(f"{script}: error: {message}", 2)
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    if "RANK" in os.environ or code and any(not thread.daemon for thread in others):
        # Python would wait for the threads until they finish, an adaptation of a minute perhaps;
        # torch.distributed would wait for processes that have ended, and now and then its threads
        # abort a process whose work is done ("terminate called without an active exception").
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _raise_stop(number, frame):
    raise KeyboardInterrupt(number)


def _fail(message, code):
    try:
        sys.stdout.flush()
    except OSError:  # its disk is full, or whoever read it has gone: Python would try again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    with contextlib.suppress(UserError):  # of an environment that names no processes: `message`
        if not is_first_to_fail():
            return code
    print(message, file=sys.stderr)
    return code


def parse_config(config_class, argv, recipes=None, doc=""):
    """Return `config_class` with the values of `argv`, else of the recipe, else its defaults.

    argv: `--name=value` each; `--help` prints the options and leaves. Field types may be int,
    float, bool, str, and tuple[...] of these. Raises UserError for an unknown name or recipe, a
    value of the wrong type, or one that the class itself refuses.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    if {"-h", "--help"} & set(argv):
        print(help_text(config_class, doc))
        raise SystemExit(0)
    named = [word.removeprefix("--recipe=") for word in argv if word.startswith("--recipe=")]
    recipe = (named or [getattr(config_class, "recipe", "")])[-1]
    if recipes and recipe not in recipes:
        raise UserError(f"there is no recipe {recipe!r}; take one of {', '.join(recipes)}")
    given = {}
    for word in (*(recipes or {}).get(recipe, "").split(), *argv):
        option, equals, text = word.partition("=")
        name = option.removeprefix("--")
        if name not in fields or not word.startswith("--"):
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean --{near[0]}=VALUE?" if near else "--help lists every option"
            raise UserError(f"unknown option {option}: {hint}")
        try:
            if not equals:  # no value; an empty one is written --name=
                raise ValueError(word)
            given[name] = read_value(text, fields[name].type)
        except ValueError:
            needed = type_name(fields[name].type)
            raise UserError(f"found {word!r}; write {option}={needed}") from None
    cfg = config_class(**given)
    for name in fields:
        setattr(cfg, name, _with_home(getattr(cfg, name)))
    return cfg


def _with_home(value):
    """Return text with a ~ at its beginning replaced by the user's folder; also of a tuple."""
    if isinstance(value, tuple):
        return tuple(map(_with_home, value))
    return os.path.expanduser(value) if isinstance(value, str) else value


def read_value(text, kind):
    """Return a word of the command line as a value of type `kind`. Raises ValueError."""
    if get_origin(kind) is tuple:
        words = text.split(",") if text.strip() else ()
        return tuple(read_value(word.strip(), get_args(kind)[0]) for word in words)
    if kind is bool:
        return ("false", "true").index(text.lower()) == 1
    if kind is str:
        return text
    if kind is float and not math.isfinite(float(text)):
        raise ValueError(text)
    return kind(text)


def help_text(config_class, doc):
    """Return what `--help` prints: the script's docstring and every option.

    The meanings are the comments in the class's source, a comment on a line of its own being a
    heading: so the help and the source cannot disagree.
    """
    lines, fields = [doc.strip()], {f.name: f for f in dataclasses.fields(config_class)}
    source = inspect.cleandoc(inspect.getsource(config_class)).partition("\n    def ")[0]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        field = re.match(r"\s*(\w+)\s*:", token.line)
        if token.type != tokenize.COMMENT:
            continue
        if not field:
            lines.append(f"\n{token.string.lstrip('# ')}:")
        elif field[1] in fields:
            option = f"--{field[1]}={type_name(fields[field[1]].type)}"
            default = show(fields[field[1]].default)
            lines.append(f"  {option:32}  {token.string.lstrip('# ')} (default {default})")
    return "\n".join(lines)


def changed_values(cfg):
    """Return one line for each value of `cfg` that is not its default."""
    return [
        f"config: {field.name} = {show(value)} (default {show(field.default)})"
        for field in dataclasses.fields(cfg)
        if (value := getattr(cfg, field.name)) != field.default
    ]


def show(value):
    """Write a value the way it is typed on the command line; an empty one as ''."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    return f"{value}" if value != "" else "''"


def type_name(kind):
    """Name a field's type: int, float, true|false, text, or a list: int,int,..."""
    if get_origin(kind) is tuple:
        item = type_name(get_args(kind)[0])
        return f"{item},{item},..."
    return {bool: "true|false", str: "text"}.get(kind, kind.__name__)


def require(cfg, *conditions):
    """Raise UserError unless all conditions hold for the config's values.

    A condition is Python: "n_way >= 2". The first option that stands in it is the one to change.
    """
    for condition in conditions:
        if not eval(condition, {}, vars(cfg)):
            name = next(word for word in re.findall(r"\w+", condition) if word in vars(cfg))
            found = show(getattr(cfg, name))
            raise UserError(f"{name} is {found}, but {condition} is needed; pass another --{name}")
