"""JSON schemas as regular expressions, for `guided`: what matches is JSON that the schema accepts.

What can't be written as a regular expression, or isn't known here, is refused. (outlines-core's converter
passes over keywords that it doesn't know, and some of its patterns match what is no JSON.)
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxrl_llm.sampling.automata import automaton

SPACE = " ?"
"""What may stand behind a colon or a comma."""

CHARACTER = r'(?:[^"\\\x00-\x1f\x7f-\x9f]|\\["\\/bfnrt])'
STRING = f'"{CHARACTER}*"'
INTEGER = "-?(?:0|[1-9][0-9]*)"
NUMBER = rf"{INTEGER}(?:\.[0-9]+)?(?:[eE][+-]?[0-9][0-9]?)?"
DATE = "[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])"
TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?Z"

SIMPLE = {"integer": INTEGER, "number": NUMBER, "boolean": "(?:true|false)", "null": "null"}
FORMATS = {
    "date": DATE,
    "time": TIME,
    "date-time": f"{DATE}T{TIME}",
    "uuid": "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
}
KEYWORDS = {
    "string": {"minLength", "maxLength", "pattern", "format"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
} | {kind: set() for kind in SIMPLE}
COUNTS = ("minLength", "maxLength", "minItems", "maxItems")
ANNOTATIONS = {"title", "description", "default", "examples", "deprecated"} | {"$schema", "$id", "$comment"}


def json_schema(schema: Mapping[str, Any] | str) -> str:
    """The regular expression of a schema.

    Known are: type (one or several), enum, const, anyOf, $ref to $defs or definitions that is not recursive;
    of strings one of minLength with maxLength, pattern (of the whole string, anchors or not) and format
    (date, time, date-time, uuid); of arrays items with minItems and maxItems, or prefixItems; of objects
    properties, which are written in their order, and required, or additionalProperties alone.

    Args:
      schema: as a mapping or as JSON.

    Raises:
      ValueError: what is not known or can't be followed, and where in the schema.
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except json.JSONDecodeError as error:
            raise ValueError(f"the schema is not JSON: {error}") from error
    root = schema if isinstance(schema, Mapping) else {}
    return _value(schema, root, "#", ())


def json_object(depth: int = 3) -> str:
    """The regular expression of JSON objects; what is in them stands in `depth` arrays or objects at most."""
    value = scalar = f"{STRING}|{NUMBER}|true|false|null"
    for _ in range(depth):
        member = f"{STRING}:{SPACE}(?:{value})"
        value = rf"{scalar}|\[{_list(f'(?:{value})')}\]|\{{{_list(member)}\}}"
    return rf"\{{{_list(f'{STRING}:{SPACE}(?:{value})')}\}}"


def _list(item: str, *, empty: bool = True) -> str:
    """Items and commas, any number of them. In this form an automaton has one copy of an item, not two."""
    items = f"(?:{item},{SPACE})*{item}"
    return f"(?:{items})?" if empty else items


def _refuse(path: str, why: str) -> ValueError:
    return ValueError(f"JSON schema at {path}: {why}")


def _value(schema: Any, root: Mapping[str, Any], path: str, within: tuple[str, ...]) -> str:
    """The pattern of `schema`, which stands at `path`, `within` the references that led there."""
    if not isinstance(schema, Mapping):
        raise _refuse(path, f"{schema!r} is no schema that says what is to be written; give a type")
    _check_types(schema, path)
    given = set(schema) - ANNOTATIONS - {"$defs", "definitions"}
    form = next((name for name in ("$ref", "const", "enum", "anyOf") if name in given), "type")
    kinds = schema.get("type", "object" if "properties" in given else [])
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    known = {"$ref": set(), "const": {"type"}, "enum": {"type"}, "anyOf": set()}.get(form)
    if known is None:
        known = set().union(*(KEYWORDS.get(kind, set()) for kind in kinds))
    if unknown := sorted(given - known - {form}):
        raise _refuse(path, f"{', '.join(unknown)} can't be kept to beside {form}={schema.get(form)!r}")

    if form == "$ref":
        name = schema["$ref"]
        target: Any = root
        for part in str(name).removeprefix("#").strip("/").split("/"):
            target = target.get(part) if isinstance(target, Mapping) else None
        if target is None:
            raise _refuse(path, f"there is nothing at {name!r}")
        if name in within:
            raise _refuse(path, f"{name!r} contains itself, which no regular expression can follow")
        return _value(target, root, name, (*within, name))
    if form in ("const", "enum"):
        values = [schema["const"]] if form == "const" else schema["enum"]
        return _either([_literal(value, kinds, path) for value in values], path)
    if form == "anyOf":
        pieces = enumerate(schema["anyOf"])
        return _either([_value(x, root, f"{path}/anyOf/{i}", within) for i, x in pieces], path)
    return _either([_typed(kind, schema, root, path, within) for kind in kinds], path)


def _check_types(schema: Mapping[str, Any], path: str) -> None:
    """Refuses keywords whose values are none, as a count that is a text."""

    def texts(value: Any) -> bool:
        return isinstance(value, list | tuple) and all(isinstance(x, str) for x in value)

    for name, value in schema.items():
        if name in COUNTS:
            good = type(value) is int and value >= 0
        elif name in ("$ref", "pattern", "format"):
            good = isinstance(value, str)
        elif name in ("enum", "anyOf", "prefixItems"):
            good = isinstance(value, list | tuple)
        elif name in ("type", "required"):
            good = texts(value) or (name == "type" and isinstance(value, str))
        else:
            good = name != "properties" or isinstance(value, Mapping)
        if not good:
            raise _refuse(path, f"{value!r} is no value of {name}")


def _either(patterns: list[str], path: str) -> str:
    if not patterns:
        raise _refuse(path, "nothing says what is to be written; give a type, an enum or anyOf")
    return patterns[0] if len(patterns) == 1 else f"(?:{'|'.join(patterns)})"


def _literal(value: Any, kinds: list[str], path: str) -> str:
    kind = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array"}.get(type(value))
    kind = "null" if value is None else kind or "object"
    if kinds and kind not in kinds and not (kind == "integer" and "number" in kinds):
        raise _refuse(path, f"{value!r} is not of type {' or '.join(kinds)}")
    return re.escape(json.dumps(value, ensure_ascii=False, allow_nan=False))


def _typed(kind: str, schema: Mapping[str, Any], root: Any, path: str, within: tuple[str, ...]) -> str:
    if kind in SIMPLE:
        return SIMPLE[kind]
    if kind == "string":
        return _string(schema, path)
    if kind == "array":
        return _array(schema, root, path, within)
    if kind == "object":
        return _object(schema, root, path, within)
    raise _refuse(path, f"unknown type {kind!r}; one of {', '.join(KEYWORDS)}")


def _string(schema: Mapping[str, Any], path: str) -> str:
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    if sum((least > 0 or most is not None, "pattern" in schema, "format" in schema)) > 1:
        raise _refuse(path, "a string may have a length, a pattern or a format, one of them")
    if "format" in schema:
        if schema["format"] not in FORMATS:
            raise _refuse(path, f"format {schema['format']!r} is not known; one of {', '.join(FORMATS)}")
        return f'"{FORMATS[schema["format"]]}"'
    if "pattern" in schema:
        pattern = re.sub(r"(?<!\\)\$$", "", schema["pattern"].removeprefix("^"))
        _check_needs_no_escapes(pattern, path)
        return f'"(?:{pattern})"'
    if most is not None and most < least:
        raise _refuse(path, f"no string has minLength {least} and maxLength {most}")
    return f'"{CHARACTER}{_times(least, most)}"'


def _times(least: int, most: int | None) -> str:
    return "*" if least == 0 and most is None else f"{{{least},{'' if most is None else most}}}"


def _check_needs_no_escapes(pattern: str, path: str) -> None:
    """Refuses a pattern that matches what would stand otherwise in JSON: quotes, backslashes, controls."""
    try:
        used = set(np.flatnonzero((automaton(pattern).table >= 0).any(axis=0)).tolist())
    except ValueError as error:
        raise _refuse(path, str(error)) from error
    if escaped := sorted(used & {*range(32), ord('"'), ord("\\"), 127}):
        raise _refuse(
            path,
            f"pattern {pattern!r} matches {chr(escaped[0])!r}, which JSON would escape: leave out quotes, "
            r'backslashes and control characters, as [^"\\\x00-\x1f\x7f] in place of a dot does',
        )


def _array(schema: Mapping[str, Any], root: Any, path: str, within: tuple[str, ...]) -> str:
    least, most = schema.get("minItems", 0), schema.get("maxItems")
    if "prefixItems" in schema:
        items = [
            _value(x, root, f"{path}/prefixItems/{i}", within) for i, x in enumerate(schema["prefixItems"])
        ]
        if not least <= len(items) <= (len(items) if most is None else most):
            raise _refuse(path, f"{len(items)} prefixItems are not minItems {least} to maxItems {most}")
        return rf"\[{f',{SPACE}'.join(items)}\]"
    if most == 0:
        return r"\[\]"
    if "items" not in schema:
        raise _refuse(path, "an array needs items or prefixItems")
    if most is not None and most < least:
        raise _refuse(path, f"no array has minItems {least} and maxItems {most}")
    item = _value(schema["items"], root, f"{path}/items", within)
    if least <= 1 and most is None:
        return rf"\[{_list(item, empty=not least)}\]"
    more = _times(max(least - 1, 0), None if most is None else most - 1)
    body = f"{item}(?:,{SPACE}{item}){more}"
    return rf"\[{body}\]" if least else rf"\[(?:{body})?\]"


def _object(schema: Mapping[str, Any], root: Any, path: str, within: tuple[str, ...]) -> str:
    required = set(schema.get("required", ()))
    properties = schema.get("properties", {})
    if missing := sorted(required - set(properties)):
        raise _refuse(path, f"required {', '.join(missing)} is not among its properties")
    if not properties:
        more = schema.get("additionalProperties", "properties" not in schema)
        if more is False:
            return r"\{\}"
        value = _value(more, root, f"{path}/additionalProperties", within)
        return rf"\{{{_list(f'{STRING}:{SPACE}{value}')}\}}"
    first, later = "", ""  # patterns of the properties from one on: nothing written yet, or something
    for name, inner in reversed(properties.items()):
        value = _value(inner, root, f"{path}/properties/{name}", within)
        member = f"{_literal(name, [], path)}:{SPACE}{value}"
        if name in required:
            first, later = f"{member}{later}", f",{SPACE}{member}{later}"
        else:
            first, later = f"(?:{member}{later}|{first})", f"(?:,{SPACE}{member})?{later}"
    return rf"\{{{first}\}}"
