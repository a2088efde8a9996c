"""The command line: options with type and meaning; every mistake one line that says what to do."""

import dataclasses
import importlib
import math
import re
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import get_origin

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.config import (
    UserError,
    _check_types,
    changed_values,
    field_meanings,
    parse_config,
    require,
    require_one_of,
)
from common.script import run_script

SCRIPTS = ("train_classifier", "train_protonet", "train_protomaml", "evaluate", "classify")


def module_of(script):
    return importlib.import_module(script)


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


@dataclass
class AtHome:
    note: str = "~/data"  # as somebody may type it at the top of a script


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("sizes", 50, "sizes is 50 in script.py, which needs a tuple of int: write (50,)"),
        ("names", ("a", 1), "names is ('a', 1) in script.py, which needs a tuple of str"),
        ("apples", "3", "apples is '3' in script.py, which needs a value of type int"),
        ("ripe", 1, "ripe is 1 in script.py, which needs a value of type bool"),
        ("weight", None, "weight is None in script.py, which needs a value of type float"),
    ],
)
def test_a_value_of_the_wrong_type_in_a_script_is_one_line(name, value, words):
    fields = dataclasses.fields(Config)
    edited = dataclasses.make_dataclass(
        "Edited", [(f.name, f.type, value if f.name == name else f.default) for f in fields]
    )
    with pytest.raises(UserError) as caught:
        _check_types(edited, {}, "script.py")
    assert str(caught.value) == words
    _check_types(edited, {name: getattr(Config, name)}, "script.py")  # given on the command line
    _check_types(Config, {"weight": 1}, "script.py")


def error_of(*words):
    with pytest.raises(UserError) as caught:
        parse_config(Config, words)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Reading words


def test_without_options_every_value_is_the_default():
    assert parse_config(Config, []) == Config()


def test_each_kind_of_value_is_read_as_its_type():
    words = (
        "--apples=7 --weight=1e-3 --ripe=true --sizes=4,5,6 --shares=0.25,1 --names=x,y --note=a=b"
    )
    cfg = parse_config(Config, [*words.split(), "--label=dark green"])
    lists = ((4, 5, 6), (0.25, 1.0), ("x", "y"))
    assert cfg == Config(7, 0.001, "dark green", True, *lists, "a=b")
    types = [int, float, str, bool, tuple, tuple, tuple, str]
    assert [type(value) for value in dataclasses.astuple(cfg)] == types
    assert all(type(share) is float for share in cfg.shares)


def test_a_tilde_that_the_shell_left_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("USERPROFILE", "/home/ada")
    assert parse_config(Config, ["--note=~/data"]).note == "/home/ada/data"
    assert parse_config(AtHome, []).note == "/home/ada/data"
    for word in ("~", "a~/b", "~x"):
        assert parse_config(Config, [f"--note={word}"]).note == word


@pytest.mark.parametrize(
    "word, value", [("true", True), ("false", False), ("True", True), ("FALSE", False)]
)
def test_a_bool_is_true_or_false_in_any_case(word, value):
    assert parse_config(Config, [f"--ripe={word}"]).ripe is value


@pytest.mark.parametrize("word", ["yes", "maybe", "1", "0", "", "t", "on"])
def test_a_bool_that_is_neither_true_nor_false_is_refused(word):
    message = error_of(f"--ripe={word}")
    assert "--ripe" in message and f"invalid true|false value: {word!r}" in message


@pytest.mark.parametrize(
    "word, value", [("1,2,3", (1, 2, 3)), ("7", (7,)), (" 1 , 2 ", (1, 2)), ("", ())]
)
def test_a_list_is_written_with_commas_and_may_be_empty(word, value):
    assert parse_config(Config, [f"--sizes={word}"]).sizes == value


@pytest.mark.parametrize("option, kind", [("apples", "int"), ("weight", "float")])
@pytest.mark.parametrize("value", ["three", "heavy", "", "1;5"])
def test_a_value_of_the_wrong_type_is_named_with_its_option(option, kind, value):
    message = error_of(f"--{option}={value}")
    assert f"--{option}" in message and "--help" in message
    assert f"invalid {kind} value: {value!r}" in message


@pytest.mark.parametrize(
    "word", ["apples=1.5", "sizes=1,x", "sizes=1,", "sizes=1.5", "shares=a", "shares=0.5;0.7"]
)
def test_a_number_of_the_wrong_type_is_refused_alone_and_in_a_list(word):
    option, value = word.split("=")
    message = error_of(f"--{word}")
    assert f"--{option}" in message and repr(value) in message and "--help" in message


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "NaN", "1e999"])
def test_floats_that_are_not_finite_are_refused_alone_and_in_lists(value):
    assert f"invalid float value: {value!r}" in error_of(f"--weight={value}")
    assert value in error_of(f"--shares=0.5,{value}")


def test_an_unknown_name_is_answered_with_the_nearest_one():
    assert error_of("--aples=3") == "unknown option --aples: did you mean --apples?"
    assert "did you mean --weight?" in error_of("--wieght=3")
    assert "did you mean --names?" in error_of("--name=a")


def test_an_unknown_name_that_resembles_none_points_to_the_help():
    message = error_of("--qqqq=1")
    assert "unknown option --qqqq" in message and "--help" in message
    assert "did you mean" not in message


@pytest.mark.parametrize("option", ["--lab=green", "--appl=3"])
def test_a_name_is_never_cut_short(option):
    assert "did you mean" in error_of(option)


@pytest.mark.parametrize("word", ["apples=3", "7", "-apples=3"])
def test_a_word_that_is_no_option_is_answered_with_how_options_look(word):
    message = error_of(word)
    assert repr(word) in message and "--name=value" in message


@pytest.mark.parametrize("option", ["--ripe", "--apples"])
def test_an_option_without_a_value_is_refused(option):
    assert f"{option}: a value is needed: {option}=VALUE" in error_of(option)


@given(
    apples=st.integers(-(10**9), 10**9),
    weight=st.floats(allow_nan=False, allow_infinity=False),
    sizes=st.lists(st.integers(0, 999), max_size=5),
)
def test_what_is_written_is_what_is_read(apples, weight, sizes):
    words = [f"--apples={apples}", f"--weight={weight!r}", f"--sizes={','.join(map(str, sizes))}"]
    cfg = parse_config(Config, words)
    assert (cfg.apples, cfg.weight, cfg.sizes) == (apples, weight, tuple(sizes))


@given(st.lists(st.text(alphabet="-=,.e0123456789aplestruinf \t\n", max_size=16), max_size=3))
def test_any_words_give_a_config_or_a_user_error(words):
    words = [word for word in words if word not in ("-h", "--help", "--")]
    for argv in (words, [f"--shares={w}" for w in words], [f"--ripe={w}" for w in words]):
        try:
            cfg = parse_config(Config, argv)
            for field in dataclasses.fields(cfg):
                assert type(getattr(cfg, field.name)) is (get_origin(field.type) or field.type)
        except UserError as error:
            assert str(error)


# Recipes


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
        # Given, though it is the default.
        (["--recipe=cake", "--apples=3"], WithRecipe("cake", 3, 0.25)),
    ],
)
def test_options_win_over_the_recipe_and_the_recipe_over_the_defaults(words, expected):
    assert parse_config(WithRecipe, words, recipes=RECIPES) == expected


def test_an_unknown_recipe_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match="'cakes'.*plain, cake"):
        parse_config(WithRecipe, ["--recipe=cakes"], recipes=RECIPES)


def recipes_of(script):
    return getattr(module_of(script), "RECIPES", {})


@pytest.mark.parametrize(
    "script, recipe", [(script, recipe) for script in SCRIPTS for recipe in recipes_of(script)]
)
def test_each_recipe_is_accepted_by_its_script_and_named_in_the_help(script, recipe):
    config_class, values = module_of(script).Config, recipes_of(script)[recipe]
    cfg = parse_config(config_class, [f"--recipe={recipe}"], recipes=recipes_of(script))
    assert {name: getattr(cfg, name) for name in values} == values
    for field in dataclasses.fields(config_class):
        value = getattr(cfg, field.name)
        assert type(value) is (get_origin(field.type) or field.type), field.name
    assert recipe in field_meanings(config_class)["recipe"][1]


def test_without_a_recipe_the_defaults_are_those_of_the_first_recipe():
    found = {script: list(recipes_of(script)) for script in SCRIPTS}
    assert found == {
        "train_classifier": ["plain", "teacher", "best", "fine"],
        "train_protonet": ["tutorial", "best"],
        "train_protomaml": ["tutorial", "best"],
        "evaluate": ["tutorial", "quick", "best"],
        "classify": [],
    }
    for script, recipes in found.items():
        if recipes:
            assert recipes_of(script)[recipes[0]] == {}
            assert module_of(script).Config().recipe == recipes[0]


def test_the_quick_test_adapts_in_few_steps_to_few_support_sets():
    evaluate = module_of("evaluate")
    cfg = parse_config(evaluate.Config, ["--recipe=quick"], recipes=evaluate.RECIPES)
    assert sum(cfg.num_inner_steps) < sum(evaluate.Config().num_inner_steps) / 5
    assert 0 < cfg.max_support_sets[0] < 10


# The help


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


def help_of(config_class, capsys, doc):
    """Return the whole help and what a reader finds there: {option: (type, meaning, default)}."""
    with pytest.raises(SystemExit) as caught:
        parse_config(config_class, ["--help"], "script.py", doc)
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "script.py" in text and doc in text
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
    config_class = module_of(script).Config
    text, options = help_of(config_class, capsys, module_of(script).__doc__)
    assert list(options) == [field.name for field in dataclasses.fields(config_class)]
    kinds = {int: "int", float: "float", bool: "true|false", str: "text"}
    kinds |= {tuple[int, ...]: "int,int,...", tuple[float, ...]: "float,float,..."}
    kinds |= {tuple[str, ...]: "text,text,..."}
    for field in dataclasses.fields(config_class):
        kind, meaning, default = options[field.name]
        assert kind == kinds[field.type]
        assert f"--{field.name}={kind}" in text
        assert len(meaning.split()) >= 2, f"{field.name} has no meaning"
        # The default in the help, typed on the command line, is the default again.
        typed = "" if default == "''" else default
        cfg = parse_config(config_class, [f"--{field.name}={typed}"])
        assert getattr(cfg, field.name) == field.default


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_defaults_of_each_script_are_accepted_by_itself(script):
    assert changed_values(parse_config(module_of(script).Config, [])) == []


# Values out of range

TRAINERS = ("train_classifier", "train_protonet", "train_protomaml")
OF_ALL_TRAINERS = [
    ("--n_way=0", "n_way is 0, but at least 2"),
    ("--n_way=1", "n_way is 1, but at least 2"),
    ("--n_way=-3", "n_way is -3, but at least 2"),
    ("--k_shot=0", "k_shot is 0, but at least 1"),
    ("--n_query=-1", "n_query is -1, but at least 1"),
    ("--epochs=0", "epochs is 0, but at least 1"),
    ("--proto_dim=0", "proto_dim is 0, but at least 1"),
    ("--image_size=28", "image_size is 28, but at least 29"),
    ("--steps_per_epoch=-1", "steps_per_epoch is -1, but at least 0"),
    ("--weight_decay=-0.1", "weight_decay is -0.1, but at least 0"),
    ("--seed=-1", "seed is -1, but at least 0"),
    ("--lr=0", "lr is 0.0, but a number above 0"),
    ("--lr=-1e-3", "lr is -0.001, but a number above 0"),
]
OUT_OF_RANGE = [
    *((script, *line) for script in TRAINERS for line in OF_ALL_TRAINERS),
    ("train_classifier", "--batch_size=1", "batch_size is 1, but at least 2"),
    ("train_classifier", "--label_smoothing=-0.1", "label_smoothing is -0.1, but at least 0"),
    ("train_classifier", "--label_smoothing=1.1", "label_smoothing is 1.1, but at most 1"),
    ("train_classifier", "--distillation_weight=2", "distillation_weight is 2.0, but at most 1"),
    ("train_classifier", "--distillation_weight=-1", "distillation_weight is -1.0, but at least 0"),
    ("train_classifier", "--temperature=0", "temperature is 0.0, but a number above 0"),
    ("train_classifier", "--color_jitter=1.5", "color_jitter is 1.5, but at most 1"),
    ("train_classifier", "--least_crop=0", "least_crop is 0.0, but a number above 0"),
    ("train_classifier", "--least_crop=1.5", "least_crop is 1.5, but at most 1"),
    ("train_protonet", "--val_way=1", "val_way is 1, but at least 2"),
    ("train_protonet", "--val_way=-1", "val_way is -1, but at least 2"),
    ("train_protonet", "--color_jitter=-0.1", "color_jitter is -0.1, but at least 0"),
    ("train_protonet", "--color_jitter=1.5", "color_jitter is 1.5, but at most 1"),
    ("train_protonet", "--least_crop=0", "least_crop is 0.0, but a number above 0"),
    ("train_protonet", "--least_crop=1.5", "least_crop is 1.5, but at most 1"),
    ("train_protonet", "--lr_drops=0.5,0", "lr_drops is 0.0, but a number above 0"),
    ("train_protonet", "--lr_drops=0.5,-1", "lr_drops is -1.0, but a number above 0"),
    ("train_protonet", "--lr_drops=0.5,1.5", "lr_drops is 1.5, but at most 1"),
    ("train_protomaml", "--val_way=1", "val_way is 1, but at least 2"),
    ("train_protomaml", "--lr_drops=0.5,0", "lr_drops is 0.0, but a number above 0"),
    ("train_protomaml", "--lr_drops=0.5,1.5", "lr_drops is 1.5, but at most 1"),
    ("train_protomaml", "--tasks_per_step=0", "tasks_per_step is 0, but at least 1"),
    ("train_protomaml", "--num_inner_steps=0", "num_inner_steps is 0, but at least 1"),
    ("train_protomaml", "--lr_inner=0", "lr_inner is 0.0, but a number above 0"),
    ("train_protomaml", "--lr_output=-1", "lr_output is -1.0, but a number above 0"),
    (
        "train_protomaml",
        "--output_init=zero",
        "output_init is 'zero', but one of prototypes, zeros.*did you mean --output_init=zeros?",
    ),
    ("train_protomaml", "--batchnorm=freeze", "batchnorm is 'freeze'.*--batchnorm=frozen"),
    ("train_protomaml", "--val_episodes=-1", "val_episodes is -1, but at least 0"),
    ("evaluate", "--k_shots=2,4,2", "k_shots is 2,4,2; pass each value once: --k_shots=2,4"),
    ("evaluate", "--k_shots=", "k_shots is ''; pass each value once"),
    ("evaluate", "--k_shots=4,0", "k_shots is 0, but at least 1"),
    ("evaluate", "--classes=train", "classes is 'train', but one of test, val"),
    (
        "evaluate",
        "--domains=mnist,mnist",
        "domains is mnist,mnist; pass each value once: --domains=mnist",
    ),
    ("evaluate", "--domains=auto,mnist", "domains is auto,mnist, but auto stands alone"),
    ("evaluate", "--domains=cifar100", "cifar100 is the data set of the training classes.*domains"),
    ("evaluate", "--num_inner_steps=", "num_inner_steps has 0 numbers for 5 values of k"),
    ("evaluate", "--num_inner_steps=0", "num_inner_steps is 0, but at least 1"),
    ("evaluate", "--domain_num_inner_steps=0", "domain_num_inner_steps is 0, but at least 1"),
    ("evaluate", "--lr_inner=0", "lr_inner is 0.0, but a number above 0"),
    ("evaluate", "--domain_lr_inner=0.1,0.2", "domain_lr_inner has 2 numbers for 5 values of k"),
    ("evaluate", "--domain_lr_output=-1", "domain_lr_output is -1.0, but a number above 0"),
    (
        "evaluate",
        "--finetune=protonets",
        "finetune is 'protonets', but one of.*--finetune=protonet",
    ),
    ("evaluate", "--finetune=maml,maml", "finetune is maml,maml; pass each value once"),
    ("evaluate", "--finetune_lr=", "finetune_lr has 0 numbers for 5 values of k"),
    ("evaluate", "--finetune_steps=1,2", "finetune_steps has 2 numbers for 5 values of k"),
    ("evaluate", "--finetune_steps=-1", "finetune_steps is -1, but at least 0"),
    ("evaluate", "--domain_finetune_lr=0", "domain_finetune_lr is 0.0, but a number above 0"),
    *(
        (script, "--precision=float16", "precision is 'float16', but one of float32, bfloat16")
        for script in ("train_classifier", "train_protonet", "train_protomaml", "evaluate")
    ),
    ("evaluate", "--views=0", "views is 0, but at least 1"),
    ("evaluate", "--max_support_sets=-1", "max_support_sets is -1, but at least 0"),
    ("evaluate", "--max_support_sets=6,6", "max_support_sets has 2 numbers for 5 values of k"),
    ("evaluate", "--domain_max_support_sets=-1", "domain_max_support_sets is -1, but at least 0"),
    (
        "evaluate",
        "--domain_max_support_sets=6,6",
        "domain_max_support_sets has 2 numbers for 5 values of k",
    ),
    ("evaluate", "--epochs=3", "unknown option --epochs"),
    ("evaluate", "--protocol=papers", "protocol is 'papers', but one of tutorial, episodes"),
    ("evaluate", "--n_way=1", "n_way is 1, but at least 2"),
    ("evaluate", "--n_query=0", "n_query is 0, but at least 1"),
    ("evaluate", "--num_episodes=0", "num_episodes is 0, but at least 1"),
]


@pytest.mark.parametrize("script, option, message", OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_with_the_value_and_the_range(script, option, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_config(module_of(script).Config, [option])
    assert "\n" not in str(caught.value) and len(str(caught.value)) > 20


@pytest.mark.parametrize(
    "option",
    [
        "--n_way=4",
        "--n_query=4",
        "--num_episodes=9",
        "--max_support_sets=3",
        "--domain_max_support_sets=3",
    ],
)
def test_an_option_of_the_other_protocol_is_refused(option):
    for_episodes = "support_sets" not in option
    own, other = ("episodes", "tutorial") if for_episodes else ("tutorial", "episodes")
    config_class = module_of("evaluate").Config
    assert parse_config(config_class, [option, f"--protocol={own}"]).protocol == own
    message = f"does nothing with --protocol={other}; pass {option.split('=')[0]}="
    with pytest.raises(UserError, match=message):
        parse_config(config_class, [option, f"--protocol={other}"])


@pytest.mark.parametrize("k_shots", ["32,16,8,4,2", "1,2,3,5,10"])
def test_a_recipes_lists_are_not_taken_for_other_k(k_shots):
    evaluate = module_of("evaluate")
    words = ["--recipe=best", f"--k_shots={k_shots}"]
    with pytest.raises(UserError, match=f"is for k = 2,4,8,16,32, not for {k_shots}; pass --"):
        parse_config(evaluate.Config, words, recipes=evaluate.RECIPES)
    lists = [name for name, value in evaluate.RECIPES["best"].items() if len(value) == 5]
    words += [f"--{name}=1,2,3,4,5" for name in lists if "sets" not in name]
    words += ["--domain_max_support_sets=6"]
    assert parse_config(evaluate.Config, words, recipes=evaluate.RECIPES).recipe == "best"


@pytest.mark.parametrize("script", ["train_protonet", "train_protomaml"])
def test_a_validation_way_of_0_is_the_training_way(script):
    assert parse_config(module_of(script).Config, ["--val_way=0"]).val_way == 0


def test_the_data_set_of_the_training_classes_is_no_unseen_domain_whichever_it_is():
    with pytest.raises(UserError, match="glyphs is the data set.*take it out of --domains"):
        parse_config(module_of("evaluate").Config, ["--dataset=glyphs", "--domains=mnist,glyphs"])


def test_the_checks_look_at_every_number_of_a_list_and_include_the_bounds_but_above():
    cfg = Config(apples=3, sizes=(3, 0, 5), shares=(1.0, 0.25))
    require(cfg, "sizes", "apples", least=0, most=5)
    require(cfg, "shares", above=0.2, most=1)
    with pytest.raises(UserError, match="sizes is 0, but at least 1 .*--sizes=N with N >= 1"):
        require(cfg, "apples", "sizes", least=1)
    with pytest.raises(UserError, match="sizes is 5, but at most 4 .*--sizes=X with X <= 4"):
        require(cfg, "sizes", most=4)
    with pytest.raises(UserError, match="shares is 0.25, .* above 0.25 .*--shares=X with X > 0.25"):
        require(cfg, "shares", above=0.25)


@pytest.mark.parametrize("bound", ["above", "least", "most"])
def test_nan_passes_no_check(bound):
    with pytest.raises(UserError, match="weight is nan"):
        require(Config(weight=math.nan), "weight", **{bound: 0})


def test_one_of_a_few_words_is_checked_and_the_nearest_is_named():
    require_one_of(Config(label="red"), "label", ("red", "green"))
    with pytest.raises(UserError, match="did you mean --label=green"):
        require_one_of(Config(label="gren"), "label", ("red", "green"))


# What a script prints, and how it ends


def test_changed_values_are_listed_with_their_defaults_and_no_others():
    cfg = Config(apples=4, ripe=True, names=("x",), note="")
    assert changed_values(cfg) == [
        "config: apples = 4 (default 3)",
        "config: ripe = true (default false)",
        "config: names = x (default a,b)",
    ]
    assert changed_values(Config(label="", note="n")) == [
        "config: label = '' (default red)",
        "config: note = n (default '')",
    ]


def run(main, words, monkeypatch, capsys, dev_mode=False):
    """Return the exit code, stdout and stderr of a script with this `main`."""
    flags = {name: getattr(sys.flags, name) for name in dir(sys.flags) if name[0] != "_"}
    monkeypatch.setattr(sys, "flags", SimpleNamespace(**{**flags, "dev_mode": dev_mode}))
    monkeypatch.setattr(sys, "argv", ["folder/script.py", *words])
    with pytest.raises(SystemExit) as caught:
        run_script(main, Config)
    printed = capsys.readouterr()
    return caught.value.code, printed.out, printed.err


def failing(error):
    """Return a `main` that raises the error."""

    def main(cfg):
        raise error

    return main


def test_a_script_echoes_what_changed_and_ends_with_mains_code(monkeypatch, capsys):
    echoed = "config: apples = 9 (default 3)\n"
    assert run(lambda cfg: None, ["--apples=9"], monkeypatch, capsys) == (0, echoed, "")
    assert run(lambda cfg: 1, [], monkeypatch, capsys) == (1, "", "")


@pytest.mark.parametrize("dev_mode", [False, True])
def test_a_user_error_becomes_one_line_and_code_2(dev_mode, monkeypatch, capsys):
    main = failing(UserError("the basket\n  is empty; fill it"))
    line = "script.py: error: the basket is empty; fill it\n"
    assert run(main, [], monkeypatch, capsys, dev_mode) == (2, "", line)
    code, out, err = run(main, ["--aples=1"], monkeypatch, capsys, dev_mode)
    assert code == 2 and out == "" and err.startswith("script.py: error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "error, words",
    [
        (
            RuntimeError("not enough memory:\nyou tried too much"),
            "RuntimeError: not enough memory:",
        ),
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory."),
            "OutOfMemoryError: CUDA out of memory.",
        ),
        (ValueError(" too large\n"), "ValueError: too large"),
        (OverflowError("x" * 1000), "OverflowError: " + "x" * 300),
        (MemoryError(), "MemoryError: MemoryError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_librarys_own_error_becomes_one_line_with_its_class_and_code_2(
    error, words, monkeypatch, capsys
):
    line = f"script.py: error: {words}; python -X dev script.py ... shows where\n"
    assert run(failing(error), [], monkeypatch, capsys) == (2, "", line)


def test_a_librarys_own_error_keeps_its_traceback_in_dev_mode(monkeypatch, capsys):
    with pytest.raises(RuntimeError, match="not enough memory"):
        run(failing(RuntimeError("not enough memory")), [], monkeypatch, capsys, dev_mode=True)


def test_an_interruption_ends_with_code_130_and_no_traceback(monkeypatch, capsys):
    code, _, err = run(failing(KeyboardInterrupt()), [], monkeypatch, capsys)
    assert code == 130 and err.count("\n") == 1


@pytest.mark.parametrize(
    "kind", [ZeroDivisionError, KeyError, IndexError, TypeError, AttributeError, AssertionError]
)
def test_a_bug_keeps_its_traceback(kind, monkeypatch, capsys):
    with pytest.raises(kind):
        run(failing(kind("a bug")), [], monkeypatch, capsys)
