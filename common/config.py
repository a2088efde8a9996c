"""A script's `Config` dataclass from its defaults and `--name=value`; errors of one line."""

import argparse
import dataclasses
import difflib
import inspect
import io
import math
import os
import re
import sys
import threading
import tokenize
from typing import get_args, get_origin

LARGEST_RATE = 1000  # of a learning rate; far above any use, far below what overflows
LARGEST_SEED = 2**63 - 1  # that torch's generators take


class UserError(Exception):
    """Something the user can put right. The message is one line: found, needed, what to do."""

    def __init__(self, message):
        super().__init__(" ".join(line.strip() for line in str(message).splitlines()))  # what a library says may have several


def run_script(main, config_class, recipes=None):
    """Read the command line, call `main(cfg)` and leave with its exit code (2 after a `UserError`).

    recipes: {name: {field: value}} for `--recipe=name`, if the class has a field of that name.
    """
    script = os.path.basename(sys.argv[0])
    try:
        cfg = parse_config(config_class, sys.argv[1:], script, inspect.getmodule(main).__doc__, recipes)
        for line in changed_values(cfg):
            print(line)
        code = main(cfg) or 0
    except UserError as error:
        sys.stdout.flush()
        print(f"{script}: error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print(f"{script}: stopped; what was saved before is intact", file=sys.stderr)
        code = 130
    if code and any(thread is not threading.main_thread() and not thread.daemon for thread in threading.enumerate()):
        # Python would wait for the threads until they have finished what they do, an adaptation of a minute perhaps.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def parse_config(config_class, argv, script="script", doc="", recipes=None):
    """Return `config_class` with the values of `argv` (`--name=value`), else of the recipe, in place of its defaults.

    Field types may be int, float, bool, str, tuple[int, ...], tuple[float, ...] and tuple[str, ...]. Raises
    UserError for an unknown name, a value of the wrong type or one that the class itself refuses.
    """
    parser = _Parser(prog=script, usage=f"python {script} [--name=value ...]", description=doc, allow_abbrev=False, formatter_class=_HelpFormat)
    group = parser
    meanings = field_meanings(config_class)
    for field in dataclasses.fields(config_class):
        heading, meaning = meanings[field.name]
        if getattr(group, "title", None) != heading:
            group = parser.add_argument_group(heading)
        group.add_argument(
            f"--{field.name}",
            type=_reader(field.type),
            default=argparse.SUPPRESS,
            metavar=type_name(field.type),
            help=f"{meaning} (default {show(field.default)})".replace("%", "%%"),
        )
    values, unknown = parser.parse_known_args([word for word in argv if word != "--"])
    unknown += [word for word in argv if word == "--"]  # argparse would take all behind it for something else
    if unknown:
        raise UserError(_unknown_option(unknown[0], [field.name for field in dataclasses.fields(config_class)]))
    given = vars(values)
    swallowed = [name for name, value in given.items() if isinstance(value, list)]  # argparse drops a value of "--"
    if swallowed:
        raise UserError(f"--{swallowed[0]}: invalid value '--'; --help lists every option")
    recipe = given.get("recipe", getattr(config_class, "recipe", None))
    if recipes and recipe not in recipes:
        raise UserError(f"there is no recipe {recipe!r}; take one of {', '.join(recipes)}")
    return config_class(**{**(recipes or {}).get(recipe, {}), **given})


def field_meanings(config_class):
    """Read {field: (group, meaning)} from the comments in the class's source, so that nothing is written twice.

    A comment on a line of its own opens a group; the comment behind a field is its meaning.
    """
    meanings, group = {}, "options"
    source = inspect.getsource(config_class)
    for token in tokenize.generate_tokens(io.StringIO(inspect.cleandoc(source)).readline):
        if token.type != tokenize.COMMENT:
            continue
        text = token.string.lstrip("# ").strip()
        field = re.match(r"\s*(\w+)\s*:", token.line)
        if field:
            meanings[field[1]] = (group, text)
        else:
            group = text
    return {field.name: meanings.get(field.name, (group, "")) for field in dataclasses.fields(config_class)}


def changed_values(cfg):
    """Return one line for each value of `cfg` that is not its default."""
    changed = []
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if value != field.default:
            changed.append(f"config: {field.name} = {show(value)} (default {show(field.default)})")
    return changed


def show(value):
    """Write a value the way it is typed on the command line; an empty one as ''."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        value = ",".join(str(item) for item in value)
    return f"{value}" if value != "" else "''"


def type_name(kind):
    """Name a field's type for `--help`: int, float, true|false, text, or a list such as int,int,..."""
    if get_origin(kind) is tuple:
        item = type_name(get_args(kind)[0])
        return f"{item},{item},..."
    return {bool: "true|false", str: "text"}.get(kind, kind.__name__)


def require_at_least(cfg, least, *names):
    """Raise UserError unless each named number (or each number of a named list) is at least `least`."""
    for name in names:
        for value in _items(cfg, name):
            if not value >= least:
                raise UserError(f"{name} is {value}, but at least {least} is needed: pass --{name}=N with N >= {least}")


def require_at_most(cfg, most, *names):
    """Raise UserError unless each named number (or each number of a named list) is at most `most`."""
    for name in names:
        for value in _items(cfg, name):
            if not value <= most:
                raise UserError(f"{name} is {value}, but at most {most} is possible: pass --{name}=X with X <= {most}")


def require_positive(cfg, *names):
    """Raise UserError unless each named number (or each number of a named list) is above zero and finite."""
    for name in names:
        for value in _items(cfg, name):
            if not 0 < value < math.inf:
                raise UserError(f"{name} is {value}, but a number above 0 is needed: pass --{name}=X with X > 0")


def require_one_of(cfg, name, allowed):
    """Raise UserError unless the named value is one of `allowed`."""
    value = getattr(cfg, name)
    if value not in allowed:
        raise UserError(f"{name} is {value!r}, but one of {', '.join(allowed)} is needed{_nearest(value, allowed, f'--{name}=')}")


def _items(cfg, name):
    value = getattr(cfg, name)
    return value if isinstance(value, tuple) else (value,)


class _HelpFormat(argparse.RawDescriptionHelpFormatter):
    """argparse's format, wide enough for one line per option, with --name=type as it is typed."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=36, width=140)

    def _format_args(self, action, default_metavar):
        return f"={super()._format_args(action, default_metavar)}"

    def _format_action_invocation(self, action):
        return super()._format_action_invocation(action).replace(" =", "=")


class _Parser(argparse.ArgumentParser):
    """argparse's parser, but an error is raised as UserError instead of printed with the whole usage."""

    def error(self, message):
        found = re.match(r"argument --(\w+): (.*)", message)
        message = f"--{found[1]}: {found[2]}" if found else message
        raise UserError(f"{message}; --help lists every option")


def _reader(kind):
    """Return the function that turns a word of the command line into a value of type `kind`."""
    if get_origin(kind) is tuple:
        read = _reader(get_args(kind)[0])
        return _named(lambda text: tuple(read(word.strip()) for word in text.split(",")) if text.strip() else (), type_name(kind))
    return {bool: _named(_read_bool, "true|false"), float: _named(_read_float, "float")}.get(kind, kind)


def _named(read, name):
    # argparse words its message with the reader's __name__: "invalid float value: 'abc'".
    read.__name__ = name
    return read


def _read_bool(text):
    return {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else _fail(text)


def _read_float(text):
    value = float(text)
    return value if math.isfinite(value) else _fail(text)


def _fail(text):
    raise ValueError(text)


def _unknown_option(word, names):
    option = word.split("=")[0]
    if not option.startswith("--"):
        return f"found {word!r}, but options are written --name=value; --help lists every option"
    name = option[2:]
    return f"unknown option {option}{_nearest(name, names, '--') or '; --help lists every option'}"


def _nearest(word, names, prefix):
    near = difflib.get_close_matches(str(word), names, n=1, cutoff=0.6)
    return f": did you mean {prefix}{near[0]}?" if near else ""
