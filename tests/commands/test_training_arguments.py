"""The options read from the source of transformers are those of the class."""

import dataclasses
import re

from transformers import TrainingArguments

from switchkd.commands.train_options import parser
from switchkd.commands.training_arguments import UNREAD
from switchkd.training.config import SwitchConfig


def actions(arguments=None):
    return {action.dest: action for action in parser(arguments)._actions if not action.dest.startswith("no_")}


def comparable(value):
    return list(value) if hasattr(value, "__iter__") else value


def test_the_parser_read_from_source_is_that_of_the_class():
    found, expected = actions(), actions(TrainingArguments)
    assert list(found) == list(expected)
    assert {option.name for option in dataclasses.fields(SwitchConfig) if option.init} <= found.keys()
    for name, action in expected.items():
        other = found[name]
        for attribute in ("option_strings", "nargs", "const", "choices", "required", "metavar", "help"):
            assert comparable(getattr(other, attribute)) == comparable(getattr(action, attribute)), (name, attribute)
        assert other.default is UNREAD or other.default == action.default, name
        # Choices are turned into texts by a function each; a class that no text can be is read as text.
        names = [getattr(one.type, "__name__", one.type) for one in (action, other)]
        assert action.choices or names[0] == names[1] or (name, other.type) == ("parallelism_config", str)


def test_only_defaults_that_depend_on_the_installation_are_left_to_the_class():
    assert [name for name, action in actions().items() if action.default is UNREAD] == ["optim"]


def test_the_help_is_the_same():
    for kind in ("format_help", "full_help"):
        found, expected = (" ".join(getattr(one, kind)().split()) for one in (parser(), parser(TrainingArguments)))
        # The default of optim depends on the installation.
        assert found == re.sub(r"\(default: adamw\w+\)", f"(default: {UNREAD})", expected)
