"""The options of `transformers.TrainingArguments` without importing it, which takes seconds of torch, peft and others.

The fields of the installed version are read from its source: names, types, defaults and help. A test compares the
parser made from them with the one made from the class itself.
"""

import ast
import dataclasses
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from transformers.utils import ExplicitEnum, logging

#: Stands for a default that is not a literal in the source: such an option is left to the class unless it is given.
UNREAD: Any = type("Unread", (), {"__repr__": lambda self: "chosen by transformers"})()


def training_arguments() -> type:
    """Return a dataclass with the fields of the installed `TrainingArguments`, for a parser to read."""
    source = _module("training_args")
    body = next(node for node in source.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    return dataclasses.make_dataclass(
        "TrainingArguments",
        [_field(node, source) for node in body.body if isinstance(node, ast.AnnAssign) and _is_option(node)],
    )


def _is_option(node: ast.AnnAssign) -> bool:
    made = node.value.keywords if isinstance(node.value, ast.Call) else []
    return all(_literal(keyword.value, True) for keyword in made if keyword.arg == "init")


def _field(node: ast.AnnAssign, source: ast.Module) -> tuple[str, Any, Any]:
    assert isinstance(node.target, ast.Name) and isinstance(node.value, ast.Call)
    given = {keyword.arg: keyword.value for keyword in node.value.keywords}
    if isinstance(made := given.get("default_factory"), ast.Name) and made.id in ("list", "dict"):
        default: dict[str, Any] = {"default_factory": {"list": list, "dict": dict}[made.id]}
    else:
        default = {"default": _literal(given["default"], UNREAD) if "default" in given else UNREAD}
    # The one name that help and choices refer to.
    names = {"trainer_log_levels": {**logging.get_log_levels_dict(), "passive": -1}}
    metadata = _evaluated(given["metadata"], names) if "metadata" in given else {}
    return node.target.id, _type(node.annotation, source), dataclasses.field(**default, metadata=metadata)


def _type(annotation: ast.expr, source: ast.Module) -> Any:
    names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
    known = {"Any": Any, "Literal": Literal, "str": str, "int": int, "float": float, "bool": bool}
    known |= {"dict": dict, "list": list}
    # A class that is not an enumeration of texts cannot be given on a command line.
    known |= {name: _enumeration(name, source) or str for name in names - known.keys()}
    return _evaluated(annotation, known)


def _enumeration(name: str, source: ast.Module) -> Any:
    """Return an enumeration that the module defines or imports from its package, None where there is none."""
    for node in source.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            members = [(item.targets[0], item.value) for item in node.body if isinstance(item, ast.Assign)]
            values = {key.id: _literal(value, None) for key, value in members if isinstance(key, ast.Name)}
            return ExplicitEnum(name, values)  # type: ignore[call-overload]
        if isinstance(node, ast.ImportFrom) and node.level == 1 and name in {alias.name for alias in node.names}:
            return _enumeration(name, _module(node.module or ""))
    return None


@lru_cache
def _module(name: str) -> ast.Module:
    package = find_spec("transformers")
    assert package is not None and package.origin is not None
    return ast.parse(Path(package.origin).with_name(f"{name}.py").read_text(encoding="utf-8"))


def _evaluated(node: ast.expr, names: dict[str, Any]) -> Any:
    return eval(compile(ast.Expression(node), "<transformers>", "eval"), names)


def _literal(node: ast.expr, otherwise: Any) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return otherwise
