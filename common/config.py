"""A script's `Config` dataclass from its defaults, a recipe and `--name=value`."""

import argparse
import dataclasses
import difflib
import inspect
import io
import math
import os
import re
import tokenize
from typing import get_args, get_origin


class UserError(Exception):
    """Something the user can put right. The message is one line: found, needed, what to do."""

    def __init__(self, message):
        # A library's own words, quoted in the message, may run over several lines.
        super().__init__(" ".join(line.strip() for line in str(message).splitlines()))


def first_line(error):
    """Return the first line of an error's message, or its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def parse_config(config_class, argv, script="script", doc="", recipes=None):
    """Return `config_class` with the values of `argv`, else of the recipe, else its defaults.

    argv: `--name=value` each. Field types may be int, float, bool, str, tuple[int, ...],
    tuple[float, ...] and tuple[str, ...]. Raises UserError for an unknown name, a value of the
    wrong type or one that the class itself refuses.
    """
    parser = _Parser(
        prog=script,
        usage=f"python {script} [--name=value ...]",
        description=doc,
        allow_abbrev=False,
        formatter_class=_HelpFormat,
    )
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
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        names = [field.name for field in dataclasses.fields(config_class)]
        raise UserError(_unknown_option(unknown[0], names))
    given = vars(values)
    recipe = given.get("recipe", getattr(config_class, "recipe", None))
    if recipes and recipe not in recipes:
        raise UserError(f"there is no recipe {recipe!r}; take one of {', '.join(recipes)}")
    values = {**(recipes or {}).get(recipe, {}), **given}
    _check_types(config_class, values, script)
    for field in dataclasses.fields(config_class):
        if field.type is str:  # a path may stand at the top of a script as it is typed
            values[field.name] = _read_str(values.get(field.name, field.default))
    return config_class(**values)


def field_meanings(config_class):
    """Read {field: (group, meaning)} from the comments in the class's source.

    A comment on a line of its own opens a group, and the comment behind a field is its meaning: so
    the help and the source cannot disagree.
    """
    meanings, group = {}, "options"
    source = inspect.cleandoc(inspect.getsource(config_class))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        text = token.string.lstrip("# ").strip()
        field = re.match(r"\s*(\w+)\s*:", token.line)
        if field:
            meanings[field[1]] = (group, text)
        else:
            group = text
    fields = dataclasses.fields(config_class)
    return {field.name: meanings.get(field.name, (group, "")) for field in fields}


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
    """Name a field's type for `--help`: int, float, true|false, text, or a list: int,int,..."""
    if get_origin(kind) is tuple:
        item = type_name(get_args(kind)[0])
        return f"{item},{item},..."
    return {bool: "true|false", str: "text"}.get(kind, kind.__name__)


def require(cfg, *names, above=-math.inf, least=-math.inf, most=math.inf):
    """Raise UserError unless above < value, least <= value <= most for each named number.

    A named list is checked number by number.
    """
    for name in names:
        value = getattr(cfg, name)
        for number in value if isinstance(value, tuple) else (value,):
            if not number > above:
                needed, example = f"a number above {above}", f"X with X > {above}"
            elif not number >= least:
                needed, example = f"at least {least}", f"N with N >= {least}"
            elif not number <= most:
                needed, example = f"at most {most}", f"X with X <= {most}"
            else:
                continue
            message = f"{name} is {number}, but {needed} is needed: pass --{name}={example}"
            raise UserError(message)


def require_one_of(cfg, name, allowed):
    """Raise UserError unless the named value, or each in a list, is one of `allowed`."""
    value = getattr(cfg, name)
    for word in value if isinstance(value, tuple) else (value,):
        if word not in allowed:
            hint = _nearest(word, allowed, f"--{name}=")
            raise UserError(f"{name} is {word!r}, but one of {', '.join(allowed)} is needed{hint}")


def refuse_own_output(cfg, name, model):
    """Raise UserError where the option `name` is the file that a training run of `model` writes."""
    path, start = getattr(cfg, name), os.path.join(cfg.checkpoint_dir, cfg.dataset, model)
    own = [os.path.abspath(f"{start}{end}") for end in (".pt", "_last.pt")]
    if path and os.path.abspath(path) in own:
        raise UserError(
            f"{name} is {path}, which the run would overwrite; move it or pass another "
            "--checkpoint_dir"
        )


def _check_types(config_class, values, script):
    """Raise UserError where a default or a recipe was edited and has the wrong type now."""
    for field in dataclasses.fields(config_class):
        value = values.get(field.name, field.default)
        if _is_of(value, field.type):
            continue
        if get_origin(field.type) is tuple:
            item = get_args(field.type)[0]
            example = f": write ({value!r},)" if _is_of(value, item) else ""
            needed = f"a tuple of {item.__name__}{example}"
        else:
            needed = f"a value of type {field.type.__name__}"
        raise UserError(f"{field.name} is {value!r} in {script}, which needs {needed}")


def _is_of(value, kind):
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        return isinstance(value, tuple) and all(_is_of(each, item) for each in value)
    return type(value) is kind or (kind is float and type(value) is int)


class _HelpFormat(argparse.RawDescriptionHelpFormatter):
    """argparse's format, wide enough for one line per option, with --name=type as it is typed."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=36, width=140)

    def _format_args(self, action, default_metavar):
        return f"={super()._format_args(action, default_metavar)}"

    def _format_action_invocation(self, action):
        return super()._format_action_invocation(action).replace(" =", "=")


class _Parser(argparse.ArgumentParser):
    """argparse's parser, but an error is raised as UserError instead of printed with the usage."""

    def error(self, message):
        found = re.match(r"argument --(\w+): (.*)", message)
        if found:
            needed = f"a value is needed: --{found[1]}=VALUE"
            message = f"--{found[1]}: {found[2].replace('expected one argument', needed)}"
        raise UserError(f"{message}; --help lists every option")


def _reader(kind):
    """Return the function that turns a word of the command line into a value of type `kind`."""
    if get_origin(kind) is tuple:
        item = _reader(get_args(kind)[0])

        def read(text):
            return tuple(item(word.strip()) for word in text.split(",")) if text.strip() else ()

    else:
        read = {bool: _read_bool, float: _read_float, str: _read_str}.get(kind)
    if not read:
        return kind
    # argparse words its message with the reader's __name__: "invalid float value: 'abc'".
    read.__name__ = type_name(kind)
    return read


def _read_str(text):
    # In --name=~/folder the shell leaves the ~ as it is.
    return os.path.expanduser(text) if text.startswith("~/") else text


def _read_bool(text):
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _read_float(text):
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _unknown_option(word, names):
    option = word.split("=")[0]
    if not option.startswith("--"):
        return f"found {word!r}, but options are written --name=value; --help lists every option"
    nearest = _nearest(option[2:], names, "--")
    return f"unknown option {option}{nearest or '; --help lists every option'}"


def _nearest(word, names, prefix):
    near = difflib.get_close_matches(str(word), names, n=1, cutoff=0.6)
    return f": did you mean {prefix}{near[0]}?" if near else ""
