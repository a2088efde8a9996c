"""The command line: every field an option with its type and meaning, every mistake one line that says what to do."""

import dataclasses
import importlib
import math
import re
import sys
from dataclasses import dataclass
from typing import get_origin

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from common.config import (
    UserError,
    changed_values,
    field_meanings,
    parse_config,
    require_at_least,
    require_one_of,
    require_positive,
    run_script,
)

SCRIPTS = ("train_protonet", "train_protomaml", "evaluate")


@dataclass
class Config:
    # food
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


def error_of(*words):
    with pytest.raises(UserError) as caught:
        parse_config(Config, words)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_without_options_every_value_is_the_default():
    assert parse_config(Config, []) == Config()


def test_each_kind_of_value_is_read_as_its_type():
    words = ["--apples=7", "--weight=1e-3", "--label=dark green", "--ripe=true", "--sizes=4,5,6", "--shares=0.25,1", "--names=x,y", "--note=a=b"]
    cfg = parse_config(Config, words)
    assert cfg == Config(7, 0.001, "dark green", True, (4, 5, 6), (0.25, 1.0), ("x", "y"), "a=b")
    assert [type(value) for value in dataclasses.astuple(cfg)] == [int, float, str, bool, tuple, tuple, tuple, str]
    assert all(type(share) is float for share in cfg.shares)


@pytest.mark.parametrize("word, value", [("true", True), ("false", False), ("True", True), ("FALSE", False)])
def test_a_bool_is_true_or_false_in_any_case(word, value):
    assert parse_config(Config, [f"--ripe={word}"]).ripe is value


@pytest.mark.parametrize("word", ["yes", "1", "0", "", "t", "on"])
def test_a_bool_that_is_neither_true_nor_false_is_refused(word):
    message = error_of(f"--ripe={word}")
    assert "--ripe" in message and "true|false" in message and repr(word) in message


@pytest.mark.parametrize("word, value", [("1,2,3", (1, 2, 3)), ("7", (7,)), (" 1 , 2 ", (1, 2)), ("", ())])
def test_a_list_is_written_with_commas_and_may_be_empty(word, value):
    assert parse_config(Config, [f"--sizes={word}"]).sizes == value


@pytest.mark.parametrize("word", ["--apples=three", "--apples=1.5", "--apples=", "--weight=heavy", "--weight=", "--sizes=1,x", "--sizes=1,", "--sizes=1.5", "--shares=a"])
def test_a_value_of_the_wrong_type_is_named_with_its_option(word):
    option, value = word.split("=")
    message = error_of(word)
    assert option in message and repr(value) in message and "--help" in message


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "NaN", "1e999"])
def test_floats_that_are_not_finite_are_refused_alone_and_in_lists(value):
    assert value in error_of(f"--weight={value}")
    assert value in error_of(f"--shares=0.5,{value}")


def test_an_unknown_name_is_answered_with_the_nearest_one():
    assert "--aples" in error_of("--aples=3") and "did you mean --apples?" in error_of("--aples=3")
    assert "did you mean --weight?" in error_of("--wieght=3")
    assert "did you mean --names?" in error_of("--name=a")


def test_an_unknown_name_that_resembles_none_points_to_the_help():
    message = error_of("--qqqq=1")
    assert "--qqqq" in message and "--help" in message and "did you mean" not in message


@pytest.mark.parametrize("option", ["--lab=green", "--appl=3"])
def test_a_name_is_never_cut_short(option):
    assert "did you mean" in error_of(option)


@pytest.mark.parametrize("word", ["apples=3", "7", "-apples=3"])
def test_a_word_that_is_no_option_is_answered_with_how_options_look(word):
    message = error_of(word)
    assert repr(word) in message and "--name=value" in message


def test_an_option_without_a_value_is_refused():
    assert "--ripe" in error_of("--ripe") and "--apples" in error_of("--apples")


@given(apples=st.integers(-(10**9), 10**9), weight=st.floats(allow_nan=False, allow_infinity=False), sizes=st.lists(st.integers(0, 999), max_size=5))
def test_what_is_written_is_what_is_read(apples, weight, sizes):
    cfg = parse_config(Config, [f"--apples={apples}", f"--weight={weight!r}", f"--sizes={','.join(map(str, sizes))}"])
    assert (cfg.apples, cfg.weight, cfg.sizes) == (apples, weight, tuple(sizes))


@given(st.lists(st.text(alphabet="-=,.e0123456789aplestruinf \t\n", max_size=16), max_size=3))
@example(["--"])
def test_any_words_give_a_config_or_a_user_error(words):
    words = [word for word in words if word not in ("-h", "--help")]
    for argv in (words, [f"--shares={word}" for word in words], [f"--ripe={word}" for word in words]):
        try:
            cfg = parse_config(Config, argv)
            for field in dataclasses.fields(cfg):
                assert type(getattr(cfg, field.name)) is (get_origin(field.type) or field.type)
        except UserError as error:
            assert str(error)


@dataclass
class WithRecipe:
    # food
    recipe: str = "plain"  # values for all that is not given
    apples: int = 3  # how many apples
    sugar: float = 0.0  # in kg


RECIPES = {"plain": {}, "cake": {"apples": 5, "sugar": 0.25}}


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], WithRecipe("plain", 3, 0.0)),
        (["--recipe=cake"], WithRecipe("cake", 5, 0.25)),
        (["--apples=1", "--recipe=cake"], WithRecipe("cake", 1, 0.25)),
        (["--recipe=cake", "--apples=3"], WithRecipe("cake", 3, 0.25)),  # given, though it is the default
    ],
)
def test_what_is_given_comes_before_the_recipe_and_the_recipe_before_the_defaults(words, expected):
    assert parse_config(WithRecipe, words, recipes=RECIPES) == expected


def test_an_unknown_recipe_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match="'cakes'.*plain, cake"):
        parse_config(WithRecipe, ["--recipe=cakes"], recipes=RECIPES)


def test_meanings_and_groups_come_from_the_comments():
    assert field_meanings(Config) == {
        "apples": ("food", "how many apples, 100 % fresh"),
        "weight": ("food", "of one apple: in kg"),
        "label": ("words", "what the basket says"),
        "ripe": ("words", "whether they can be eaten"),
        "sizes": ("lists", "numbers of apples"),
        "shares": ("lists", "shares of the basket"),
        "names": ("lists", "names of the baskets"),
        "note": ("lists", "empty unless given"),
    }


def help_of(config_class, capsys, doc=""):
    """Return the whole help, and {option: (type, meaning, default)} as a reader finds them there."""
    with pytest.raises(SystemExit) as caught:
        parse_config(config_class, ["--help"], "script.py", doc)
    assert caught.value.code == 0
    text = capsys.readouterr().out
    options = {}
    # One entry per option, its lines joined, for they may break anywhere.
    for entry in re.split(r"\n +(?=--)|\n\n", text.partition("show this help")[2]):
        match = re.fullmatch(r"--(\w+)[= ](\S+) (.+) \(default:? (.+)\)", " ".join(entry.split()))
        if match:
            assert match[1] not in options
            options[match[1]] = match.groups()[1:]
    return text, options


def test_the_help_shows_type_meaning_and_default(capsys):
    text, options = help_of(Config, capsys, "What the script does.")
    assert "script.py" in text and "What the script does." in text
    for group in ("food:", "words:", "lists:"):
        assert f"\n{group}\n" in text
    assert options == {
        "apples": ("int", "how many apples, 100 % fresh", "3"),
        "weight": ("float", "of one apple: in kg", "0.5"),
        "label": ("text", "what the basket says", "red"),
        "ripe": ("true|false", "whether they can be eaten", "false"),
        "sizes": ("int,int,...", "numbers of apples", "1,2"),
        "shares": ("float,float,...", "shares of the basket", "0.5"),
        "names": ("text,text,...", "names of the baskets", "a,b"),
        "note": ("text", "empty unless given", "''"),
    }


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_help_of_each_script_explains_every_option(script, capsys):
    config_class = importlib.import_module(script).Config
    _, options = help_of(config_class, capsys)
    assert list(options) == [field.name for field in dataclasses.fields(config_class)]
    kinds = {int: "int", float: "float", bool: "true|false", str: "text"}
    kinds |= {tuple[int, ...]: "int,int,...", tuple[float, ...]: "float,float,...", tuple[str, ...]: "text,text,..."}
    for field in dataclasses.fields(config_class):
        kind, meaning, default = options[field.name]
        assert kind == kinds[field.type]
        assert len(meaning.split()) >= 2, f"{field.name} has no meaning"
        # The default in the help, typed on the command line, is the default again.
        typed = "" if default == "''" else default
        assert getattr(parse_config(config_class, [f"--{field.name}={typed}"]), field.name) == field.default


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_defaults_of_each_script_are_accepted_by_itself(script):
    config_class = importlib.import_module(script).Config
    assert changed_values(parse_config(config_class, [])) == []


@pytest.mark.parametrize(
    "script, words, parts",
    [
        ("train_protonet", ["--n_way=1"], ["n_way", "1", "2"]),
        ("train_protonet", ["--epochs=0"], ["epochs", "0", "1"]),
        ("train_protonet", ["--lr=0"], ["lr", "0"]),
        ("train_protonet", ["--lr=-0.1"], ["lr", "-0.1"]),
        ("train_protonet", ["--lr_drops=0.5,-1"], ["lr_drops", "-1"]),
        ("train_protonet", ["--seed=-1"], ["seed", "-1"]),
        ("train_protomaml", ["--output_init=zero"], ["output_init", "'zero'", "zeros", "prototypes", "did you mean --output_init=zeros?"]),
        ("train_protomaml", ["--tasks_per_step=0"], ["tasks_per_step", "0", "1"]),
        ("evaluate", ["--k_shots=4,0"], ["k_shots", "0", "1"]),
        ("evaluate", ["--k_shots=2,2"], ["k_shots", "2,2", "once"]),
        ("evaluate", ["--k_shots="], ["k_shots", "empty"]),
        ("evaluate", ["--dataset=glyphs", "--domains=glyphs"], ["glyphs", "--domains"]),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_value_and_the_range(script, words, parts):
    with pytest.raises(UserError) as caught:
        parse_config(importlib.import_module(script).Config, words)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_the_checks_look_at_every_number_of_a_list():
    cfg = Config(sizes=(3, 0, 5), shares=(1.0, math.inf))
    require_at_least(cfg, 0, "sizes", "apples")
    with pytest.raises(UserError, match="sizes is 0"):
        require_at_least(cfg, 1, "sizes")
    with pytest.raises(UserError, match="shares is inf"):
        require_positive(cfg, "shares")


def test_nan_passes_no_check():
    with pytest.raises(UserError, match="nan"):
        require_at_least(Config(weight=math.nan), 0, "weight")
    with pytest.raises(UserError, match="nan"):
        require_positive(Config(weight=math.nan), "weight")


def test_one_of_a_few_words_is_checked_and_the_nearest_is_named():
    require_one_of(Config(label="red"), "label", ("red", "green"))
    with pytest.raises(UserError, match="did you mean --label=green"):
        require_one_of(Config(label="gren"), "label", ("red", "green"))


def test_changed_values_are_listed_with_their_defaults_and_no_others():
    cfg = Config(apples=4, ripe=True, names=("x",), note="")
    assert changed_values(cfg) == [
        "config: apples = 4 (default 3)",
        "config: ripe = true (default false)",
        "config: names = x (default a,b)",
    ]
    assert changed_values(Config(label="", note="n")) == ["config: label = '' (default red)", "config: note = n (default '')"]


def run(main, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["folder/script.py", *words])
    with pytest.raises(SystemExit) as caught:
        run_script(main, Config)
    printed = capsys.readouterr()
    return caught.value.code, printed.out, printed.err


def test_a_script_echoes_what_changed_and_ends_with_mains_code(monkeypatch, capsys):
    assert run(lambda cfg: None, ["--apples=9"], monkeypatch, capsys) == (0, "config: apples = 9 (default 3)\n", "")
    assert run(lambda cfg: 1, [], monkeypatch, capsys) == (1, "", "")


def test_a_user_error_becomes_one_line_and_code_2(monkeypatch, capsys):
    def fail(cfg):
        raise UserError("the basket\n  is empty; fill it")

    assert run(fail, [], monkeypatch, capsys) == (2, "", "script.py: error: the basket is empty; fill it\n")
    code, out, err = run(fail, ["--aples=1"], monkeypatch, capsys)
    assert code == 2 and out == "" and err.startswith("script.py: error: ") and err.count("\n") == 1


def test_an_interruption_ends_with_code_130_and_no_traceback(monkeypatch, capsys):
    def interrupt(cfg):
        raise KeyboardInterrupt

    code, _, err = run(interrupt, [], monkeypatch, capsys)
    assert code == 130 and err.count("\n") == 1


def test_a_bug_keeps_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(ZeroDivisionError):
        run_script(lambda cfg: 1 / 0, Config)
