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
import tokenize
from typing import get_args, get_origin


class UserError(Exception):
    """Something the user can put right. The message is one line: found, needed, what to do."""


def run_script(main, config_class):
    """Read the command line, call `main(cfg)` and leave with its exit code (2 after a `UserError`)."""
    script = os.path.basename(sys.argv[0])
    try:
        cfg = parse_config(config_class, sys.argv[1:], script, inspect.getmodule(main).__doc__)
        for line in changed_values(cfg):
            print(line)
        code = main(cfg) or 0
    except UserError as error:
        sys.stdout.flush()
        print(f"{script}: error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print(f"{script}: stopped; what was saved before is intact", file=sys.stderr)
        code = 130
    sys.exit(code)


def parse_config(config_class, argv, script="script", doc=""):
    """Return `config_class` with the values of `argv` (`--name=value`) in place of its defaults.

    Field types may be int, float, bool, str, tuple[int, ...], tuple[float, ...] and tuple[str, ...]. Raises
    UserError for an unknown name, a value of the wrong type or one that the class itself refuses.
    """
    parser = _Parser(prog=script, description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser
    meanings = field_meanings(config_class)
    for field in dataclasses.fields(config_class):
        heading, meaning = meanings[field.name]
        if getattr(group, "title", None) != heading:
            group = parser.add_argument_group(heading)
        group.add_argument(
            f"--{field.name}",
            type=_reader(field.type),
            default=field.default,
            metavar=type_name(field.type),
            help=f"{meaning} (default: {show(field.default)})".replace("%", "%%"),
        )
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(_unknown_option(unknown[0], [field.name for field in dataclasses.fields(config_class)]))
    return config_class(**vars(values))


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
    near = difflib.get_close_matches(str(word), names, n=1, cutoff=0.4)
    return f": did you mean {prefix}{near[0]}?" if near else ""
