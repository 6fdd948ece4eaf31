"""YAML files of options; one may hold only what differs from another, its base."""

import re
from pathlib import Path
from typing import Any

import yaml

from switchkd.errors import UserError

#: The key under which a file names the file, or the files in order, whose values it changes.
BASE = "base"

Entries = list[tuple[yaml.ScalarNode, yaml.Node]]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 5e-4 as text for want of a dot; nested values are read as JSON would."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_entries(path: str | Path, _above: tuple[Path, ...] = ()) -> Entries:
    """Return the keys and values of a file over those of its base, as nodes that know their file and line.

    A mapping is merged with that of the base key by key; every other value replaces the base's.

    Raises:
        UserError: A file is missing, malformed, or its own base.
    """
    path = Path(path).expanduser()
    entries = _entries(path, _above)
    merged: Entries = []
    for key, node in entries:
        if key.value == BASE:
            for name in _bases(node, path):
                found = path.parent / Path(name).expanduser()
                chain = (*_above, path.resolve())
                if found.resolve() in chain:
                    names = " -> ".join(one.name for one in (*chain, found.resolve()))
                    raise UserError(f"{path}, line {key.start_mark.line + 1}: base turns in a circle: {names}")
                if not found.is_file():
                    raise UserError(f"{path}, line {key.start_mark.line + 1}: no base file {name} in {path.parent}")
                merged = _merged(merged, read_entries(found, chain))
    return _merged(merged, [entry for entry in entries if entry[0].value != BASE])


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Return the content of a file over that of its base.

    Raises:
        UserError: As `read_entries`, or a key that comes twice.
    """
    found: dict[str, Any] = {}
    for key, node in read_entries(path):
        if key.value in found:
            raise UserError(f"{key.start_mark.name}, line {key.start_mark.line + 1}: duplicate key {key.value!r}")
        found[str(key.value)] = construct(node)
    return found


def files_of(path: Path) -> list[Path]:
    """Return a file and every file that it is based on, each once."""
    found = [path]
    for key, node in _entries(path, ()):
        if key.value == BASE:
            found += [file for name in _bases(node, path) for file in files_of(path.parent / name)]
    return list(dict.fromkeys(found))


def construct(node: yaml.Node) -> Any:
    """Return the value of a node."""
    loader = _Loader("")
    try:
        return loader.construct_document(node)
    finally:
        loader.dispose()


def read_value(text: str) -> Any:
    """Return the value of a word of the command line, read as one of a file is."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError:
        return text


def _entries(path: Path, above: tuple[Path, ...]) -> Entries:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no config file {path}: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read config file {path}: {error}") from error
    try:
        loader = _Loader(text)
        loader.name = str(path)
        try:
            root = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UserError(f"{path}, line {line}: malformed YAML ({error.problem})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: malformed YAML ({str(error).splitlines()[0]})") from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}: expected lines of `key: value`")
    return list(root.value)


def _bases(node: yaml.Node, path: Path) -> list[str]:
    value = construct(node)
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}, line {node.start_mark.line + 1}: base must be a file or a list of files")
    return names


def _merged(below: Entries, above: Entries) -> Entries:
    """The entries of two mappings, in the order in which they come first; keys that come twice in one stay."""
    replaced = {key.value: (key, node) for key, node in above}
    result, known = [], set()
    for key, node in below:
        known.add(key.value)
        if key.value in replaced:
            other_key, other = replaced[key.value]
            if isinstance(node, yaml.MappingNode) and isinstance(other, yaml.MappingNode):
                other = yaml.MappingNode(
                    other.tag, _merged(node.value, other.value), other.start_mark, other.end_mark, other.flow_style
                )
            key, node = other_key, other
        result.append((key, node))
    return result + [entry for entry in above if entry[0].value not in known]
