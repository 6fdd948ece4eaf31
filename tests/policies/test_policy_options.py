"""The table that flags, config fields and help are made from holds the options that the policies have."""

import argparse
import dataclasses

import pytest

from switchkd.commands.policy_options import NAMES, OPTIONS, add_policy_options
from switchkd.methods import METHODS
from switchkd.policies import POLICIES
from switchkd.policies.base import Policy
from switchkd.policy_options import POLICY_OPTIONS, TRAINING_ONLY
from switchkd.rollout import MEASURED
from switchkd.training.config import SwitchConfig

KINDS = {int: "int", float: "float", str: "str"}


@pytest.mark.parametrize("name", list(POLICIES))
def test_the_table_holds_the_fields_of_every_policy_with_their_defaults(name):
    """Help stated wrong defaults of initial_threshold for student_entropy and student_confidence."""
    own = POLICIES[name].options()
    table = {option: o.default[name] for option, o in POLICY_OPTIONS.items() if name in o.policies}
    assert own.keys() == table.keys()
    for option, default in own.items():
        follows_limit = option in POLICIES[name].length_options
        assert table[option] == (None if follows_limit else default), option


@pytest.mark.parametrize("policy", POLICIES.values())
def test_a_policy_that_compares_something_says_what(policy):
    """Logs called the divergence of SWITCH, entropies and the training loss by one word."""
    assert (policy.measure is Policy.measure) == (policy().measured is None)
    assert policy().measured in (None, *MEASURED)


def test_every_policy_and_option_is_on_the_command_line_and_in_the_config():
    assert sorted(NAMES) == sorted(POLICIES)
    parser = argparse.ArgumentParser()
    add_policy_options(parser)
    flags = {action.dest: action for action in parser._actions}
    fields = {field.name: field for field in dataclasses.fields(SwitchConfig)}
    for name, option in POLICY_OPTIONS.items():
        # transformers takes the None out of the type when it makes a parser.
        assert fields[name].type in (option.kind, option.kind | None) and fields[name].default is None
        assert name in TRAINING_ONLY or (name in OPTIONS and flags[name].type is option.kind)


@pytest.mark.parametrize("method", [method for method in METHODS.values() if method.policy_options])
def test_the_help_of_train_states_the_value_that_holds_for_each_method(method):
    fields = {field.name: field for field in dataclasses.fields(SwitchConfig)}
    for name, value in method.default_options("max_completion_length").items():
        help = fields[name].metadata["help"]
        shown = f"{value:.4g}" if isinstance(value, float) else value
        assert method.name in help.split(":")[0].lower() and f"{shown}" in help.split("(default: ")[1]


@pytest.mark.parametrize("method", [method for method in METHODS.values() if method.policy is not None])
def test_the_policy_of_a_method_is_one_of_the_table(method):
    assert method.policy in POLICIES
    assert method.policy_class() is POLICIES[method.policy]


def test_a_method_may_have_a_policy_of_ones_own():
    """Methods name their policies; a class works as well."""
    named = METHODS["skd"]
    own = dataclasses.replace(named, policy=POLICIES["skd"])
    assert own.policy_options == named.policy_options and own.default_options(64) == named.default_options(64)
    assert own.policy_class() is named.policy_class()
