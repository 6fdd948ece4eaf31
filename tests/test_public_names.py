"""What users import: names of the package, and modules that stay where they are."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

import switchkd

MODULES = ("policies", "divergences", "methods", "objective", "data", "evaluation", "engine")


def test_every_public_name_is_there_and_type_checkers_see_the_same_ones():
    for name in switchkd.__all__:
        assert getattr(switchkd, name) is not None
    tree = ast.parse(Path(switchkd.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {(node.module, alias.asname) for node in block.body for alias in node.names}
    assert seen == {(f"switchkd.{module}", name) for name, module in switchkd._HOMES.items()}


def test_every_policy_is_a_public_name():
    from switchkd.policies import POLICIES

    assert {policy.__name__ for policy in POLICIES.values()} <= set(switchkd.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_modules_that_documents_name_are_attributes_after_import_switchkd(name):
    assert getattr(switchkd, name) is import_module(f"switchkd.{name}")
    with pytest.raises(AttributeError, match="has no attribute 'kin'"):
        _ = switchkd.kin
