"""The command line: options with type and meaning; every mistake one line that says what to do."""

import dataclasses
import importlib
import io
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import UserError
from common.config import changed_values, help_text, parse_config, run_script, type_name

SCRIPTS = ("train_classifier", "train_protonet", "train_protomaml", "evaluate", "classify")
MODULES = {script: importlib.import_module(script) for script in SCRIPTS}
RECIPES_OF = {script: getattr(module, "RECIPES", {}) for script, module in MODULES.items()}


@dataclass
class Config:
    # food
    recipe: str = "plain"  # values for all that is not given
    apples: int = 3  # how many apples, 100 % fresh
    weight: float = 0.5  # of one apple: in kg
    # words
    label: str = "red"  # what the basket says
    ripe: bool = False  # whether they can be eaten
    # lists
    sizes: tuple[int, ...] = (1, 2)  # numbers of apples
    shares: tuple[float, ...] = (0.5,)  # shares of the basket
    names: tuple[str, ...] = ("a", "b")  # names of the baskets
    note: str = ""  # empty unless given
    resume: bool = False  # go on


RECIPES = {"plain": "", "cake": "--apples=5 --weight=0.25"}


def error_of(*words, config_class=Config, recipes=None):
    with pytest.raises(UserError) as caught:
        parse_config(config_class, words, recipes)
    return str(caught.value)


def check_types(cfg):
    for field in dataclasses.fields(cfg):
        assert type(getattr(cfg, field.name)) is (get_origin(field.type) or field.type), field.name


def test_each_kind_of_value_is_read_as_its_type(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    words = "--apples=7 --weight=1e-3 --ripe=True --sizes=4,5 --shares=0.25,1 --names=x, --note=~/a"
    cfg = parse_config(Config, [*words.split(), "--label=dark = green"])
    lists = ((4, 5), (0.25, 1.0), ("x", ""), "/home/ada/a")
    assert cfg == Config("plain", 7, 0.001, "dark = green", True, *lists)
    check_types(cfg)
    assert parse_config(Config, ["--sizes="]).sizes == () and parse_config(Config, []) == Config()


@pytest.mark.parametrize(
    "word, words",
    [
        ("--ripe=yes", ("'--ripe=yes'", "--ripe=true|false")),
        ("--weight=nan", ("'--weight=nan'", "--weight=float")),
        ("--label", ("'--label'", "--label=text")),
        ("--aples=3", ("unknown option --aples", "did you mean --apples")),
        ("--qqqq=1", ("unknown option --qqqq", "--help lists every option")),
        ("apples=3", ("unknown option apples", "--apples=VALUE")),
        ("--recipe=cakes", ("no recipe 'cakes'", "plain, cake")),
    ],
)
def test_a_word_that_cannot_be_read_is_one_line_that_names_what_is_needed(word, words):
    message = error_of(word, recipes=RECIPES)
    assert all(part in message for part in words), message


@given(st.sampled_from(SCRIPTS), st.data())
def test_any_words_give_a_config_or_a_user_error(script, data):
    config_class, recipes = MODULES[script].Config, RECIPES_OF[script]
    values = st.sampled_from("0 -1 3 0.5 nan 1e999 true 2,4 2,,4 best ٣ é = %s".split())
    values = st.one_of(values, st.text(max_size=8), st.integers().map(str), st.floats().map(repr))
    names = st.sampled_from([field.name for field in dataclasses.fields(config_class)])
    options = st.builds("--{}={}".format, names, values)
    argv = data.draw(st.lists(st.one_of(options, options, values), max_size=4))
    try:
        cfg = parse_config(config_class, argv, recipes)
    except UserError as error:
        assert str(error)
    else:
        check_types(cfg)
        changed_values(cfg)


def test_a_home_folder_is_meant_wherever_the_text_comes_from(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")

    @dataclass
    class AtTheTop:
        folder: str = "~"
        files: tuple[str, ...] = ("~/a", "b~")
        count: int = 1

    assert parse_config(AtTheTop, []) == AtTheTop("/home/ada", ("/home/ada/a", "b~"))
    cfg = parse_config(AtTheTop, ["--folder=~/x", "--files=~,c"])
    assert cfg == AtTheTop("/home/ada/x", ("/home/ada", "c"))


def test_importing_a_script_changes_nothing():
    script = f"""
import signal, socket, sys, matplotlib, torch
def state():
    handlers = [signal.getsignal(number) for number in sorted(signal.valid_signals())]
    modes = torch.get_default_dtype(), torch.get_num_threads(), torch.initial_seed()
    return matplotlib.rcParams["backend"], socket.getdefaulttimeout(), sys.stdout, handlers, modes
matplotlib.use("svg")
torch.manual_seed(5)
before = state()
import {", ".join(SCRIPTS)}
assert state() == before and "matplotlib.pyplot" not in sys.modules
"""
    folder = os.path.dirname(MODULES["evaluate"].__file__)
    process = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True)
    assert not process.returncode, process.stderr


def test_options_win_over_the_recipe_and_the_recipe_over_the_defaults():
    for words, apples, weight in [
        ("--recipe=plain", 3, 0.5),
        ("--recipe=cake", 5, 0.25),
        ("--apples=1 --recipe=cake", 1, 0.25),
        ("--recipe=cake --apples=3", 3, 0.25),  # given, though it is the default
    ]:
        cfg = parse_config(Config, words.split(), RECIPES)
        assert (cfg.apples, cfg.weight) == (apples, weight)


@pytest.mark.parametrize(
    "script, recipe", [(script, recipe) for script in SCRIPTS for recipe in RECIPES_OF[script]]
)
def test_each_recipe_is_accepted_by_its_script_and_the_first_one_is_the_defaults(script, recipe):
    config_class, options = MODULES[script].Config, RECIPES_OF[script][recipe]
    cfg = parse_config(config_class, [f"--recipe={recipe}"], RECIPES_OF[script])
    cfg.recipe = config_class().recipe
    assert cfg == parse_config(config_class, options.split())
    check_types(cfg)
    assert (options == "") == (config_class().recipe == recipe)


def test_the_help_groups_the_options_and_shows_type_meaning_and_default():
    text = help_text(Config, "What it does.")
    assert text.startswith("What it does.\n\nfood:\n  --recipe=text")
    assert re.findall("^.*:$", text, re.MULTILINE) == ["food:", "words:", "lists:"]
    assert f"  --weight=float{' ' * 18}  of one apple: in kg (default 0.5)\n" in text
    assert f"  --ripe=true|false{' ' * 15}  whether they can be eaten (default false)\n" in text
    assert f"  --names=text,text,...{' ' * 11}  names of the baskets (default a,b)\n" in text


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_help_of_each_script_explains_every_option(script, capsys):
    config_class, recipes = MODULES[script].Config, RECIPES_OF[script]
    with pytest.raises(SystemExit) as caught:
        parse_config(config_class, ["--help"], recipes, MODULES[script].__doc__)
    text = capsys.readouterr().out
    assert caught.value.code == 0 and text.startswith(MODULES[script].__doc__.strip())
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.startswith("  --")]
    options = {option: meaning.rpartition(" (default ") for option, meaning in lines}
    fields = dataclasses.fields(config_class)
    assert list(options) == [f"--{field.name}={type_name(field.type)}" for field in fields]
    for field, (meaning, _, default) in zip(fields, options.values(), strict=True):
        assert len(meaning.split()) >= 2, f"{field.name} has no meaning"
        # The default in the help, typed on the command line, is the default again.
        typed = "" if default == "'')" else default[:-1]
        cfg = parse_config(config_class, [f"--{field.name}={typed}"])
        assert getattr(cfg, field.name) == field.default
    assert all(recipe in text for recipe in recipes)


@pytest.mark.parametrize(
    "script, word, message",
    [
        ("train_protonet", "--n_way=1", "n_way is 1, but n_way >= 2 is needed; pass another"),
        ("train_protonet", "--val_way=1", "val_way is 1, but "),
        ("train_protomaml", "--batchnorm=frozen", "batchnorm == 'batch' or init_from is needed"),
        ("evaluate", "--lr_inner=-0.5", "lr_inner is -0.5, but "),
        ("evaluate", "--finetune_lr=0", "finetune_lr is 0.0, but "),
        ("train_protonet", "--lr_drops=0.5,1.5", "lr_drops is 0.5,1.5, but all(0 < share <= 1"),
        ("evaluate", "--min_view_area=0.4", "but views > 2 or min_view_area == 0.7 is needed"),
        ("evaluate", "--n_way=20", "num_episodes is 0, but num_episodes >= 1 or (n_way, n_query)"),
        ("evaluate", "--domains=cifar100", "domains is cifar100, but domains.count(dataset) == 0"),
        ("evaluate", "--k_shots=2,4,2", "k_shots is 2,4,2, but len(set(k_shots)) == len(k_shots)"),
        ("classify", "--unsure=1.5", "unsure is 1.5, but 0 <= unsure <= 1 is needed; pass another"),
    ],
)
def test_a_value_out_of_range_is_one_sentence_with_name_value_and_condition(script, word, message):
    assert message in error_of(word, config_class=MODULES[script].Config)


@pytest.fixture
def run(monkeypatch, capsys):
    """A function: run a script whose `main` is `result`, or raises it; return code and output."""
    monkeypatch.setattr(os, "_exit", sys.exit)  # the tests go on

    def run(result, *words, dev_mode=False):
        def main(cfg):
            if isinstance(result, Exception):
                raise result
            return result(cfg)

        flags = {name: getattr(sys.flags, name) for name in dir(sys.flags) if name[0] != "_"}
        monkeypatch.setattr(sys, "flags", SimpleNamespace(**{**flags, "dev_mode": dev_mode}))
        monkeypatch.setattr(sys, "argv", ["folder/script.py", *words])
        with pytest.raises(SystemExit) as caught:
            run_script(main, Config)
        return caught.value.code, *capsys.readouterr()

    signals = signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
    handlers = [signal.signal(number, signal.SIG_DFL) for number in signals]
    yield run
    for number, handler in zip(signals, handlers):
        signal.signal(number, handler)


def test_a_script_echoes_what_changed_and_ends_with_mains_code(run):
    echo = "config: apples = 9 (default 3)\nconfig: label = '' (default red)\n"
    assert run(lambda cfg: None, "--apples=9", "--label=", "--names=a,b") == (0, echo, "")
    assert run(lambda cfg: 1) == (1, "", "")


@pytest.mark.parametrize(
    "error, line",
    [
        (UserError("the basket\n  is empty; fill it"), "the basket is empty; fill it\n"),
        (RuntimeError("no memory:\nyou tried"), "RuntimeError: no memory: you tried; python"),
        (MemoryError(), "MemoryError: MemoryError; python -X dev script.py ... shows where"),
    ],
)
def test_an_error_of_the_user_or_of_a_library_is_one_line_and_code_2(error, line, run):
    code, out, err = run(error)
    assert (code, out) == (2, "") and err.startswith(f"script.py: error: {line}")
    assert err.count("\n") == 1


def test_a_bug_keeps_its_traceback_and_in_dev_mode_a_librarys_error_too(run):
    for kind in (KeyError, TypeError, AssertionError):
        with pytest.raises(kind):
            run(kind("a bug"))
    with pytest.raises(RuntimeError, match="no memory"):
        run(RuntimeError("no memory"), dev_mode=True)
    assert run(UserError("empty"), dev_mode=True) == (2, "", "script.py: error: empty\n")
    wrapped = UserError("an encoder cannot be made")
    wrapped.__cause__ = ZeroDivisionError()
    with pytest.raises(UserError):
        run(wrapped, dev_mode=True)


@pytest.mark.parametrize(
    "number, code",
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)],
)
def test_a_signal_ends_the_script_at_once_with_one_line_and_its_code(number, code, run):
    line = "script.py: stopped; what was saved before is intact; add --resume=auto to go on after"
    found = run(lambda cfg: signal.raise_signal(number))
    assert found == (code, "", f"{line} the last whole epoch\n")


def test_a_signal_that_is_ignored_or_not_known_stays_so(run, monkeypatch):
    monkeypatch.delattr(signal, "SIGUSR1")  # as on Windows
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as by nohup
    assert run(lambda cfg: signal.raise_signal(signal.SIGHUP))[0] == 0
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("rank, count", [("0", ""), ("", "2"), ("2", "2"), ("-1", "2"), ("0", "x")])
def test_processes_that_a_cluster_left_in_the_environment_are_one_line(
    rank, count, run, monkeypatch
):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", count)
    monkeypatch.setattr(os, "_exit", sys.exit)
    code, _, line = run(lambda cfg: 0)
    assert code == 2 and line.count("\n") == 1 and f"RANK={rank} WORLD_SIZE={count} " in line
    assert "unset RANK WORLD_SIZE" in line


def test_what_the_terminal_cannot_print_is_escaped(run, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert run(lambda cfg: print("Katze, 猫"))[0] == 0
    terminal.flush()
    assert terminal.buffer.getvalue() == b"Katze, \\u732b\n"
