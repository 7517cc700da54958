"""Reading a profile: its YAML file, the one it extends, overrides, and what is wrong with them."""

from __future__ import annotations

import copy
import functools
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from adaptive_margins.errors import AdaptiveMarginsError
from adaptive_margins.markup import active
from adaptive_margins.profiles.config import Profile


class ProfileError(AdaptiveMarginsError, ValueError):
    """A profile that cannot be used.

    The message names the file, the key, the value and what is allowed.
    """


class _Loader(yaml.SafeLoader):
    """Refuses a mapping with a key twice, of which PyYAML would take the second without a word."""

    aliases = 0

    def fetch_alias(self) -> None:
        self.aliases += 1
        if self.aliases > 20:
            problem = "more than 20 aliases (*NAME), which could make a text of any length"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.get_mark())
        super().fetch_alias()

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is given twice; keep one of them",
                    problem_mark=key.start_mark,
                )
            seen.add(key.value)
        return node


def available() -> list[str]:
    """Names of the profiles that come with the library."""
    names = (path.name for path in files(__package__).iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def load_profile(profile: str | Path, **overrides: Any) -> Profile:
    """Read a profile by name (``laptop``) or path (``my.yaml``).

    A file may name another profile with ``extends`` (a path is relative to the file) and then holds
    only what differs from it. ``overrides`` replace values by dotted key with ``__`` for the dot
    (``static__triples=64``); ``None`` leaves a value.

    Raises:
        ProfileError: names the file, each bad key, its value and what is allowed.
    """
    source = str(profile)
    try:
        source, values = _read(source)
        for dotted, value in overrides.items():
            if value is not None:
                for key in reversed(dotted.split("__")):
                    value = {key: value}
                values = _merged(values, value)
        if fault := active(values):
            raise ProfileError(f"{source}: {fault}")
        return Profile.model_validate(values)
    except RecursionError:
        raise ProfileError(f"{source}: an alias (*NAME) stands for what it is part of") from None
    except ValidationError as error:
        lines = [f"  {_message(one)}" for one in error.errors()]
        raise ProfileError(f"{source} has {len(lines)} error(s):\n" + "\n".join(lines)) from None


def _message(error: Any) -> str:
    """A validation error: the dotted key, what is wrong, and the value."""
    key = [str(part) for part in error["loc"]]
    if key[:1] == ["collection"]:
        del key[1:2]  # the kind, which is no key
    got = "" if isinstance(error["input"], dict) else f" (got {error['input']!r})"
    return f"{'.'.join(key) or 'profile'}: {error['msg'].removeprefix('Value error, ')}{got}"


def _read(profile: str, extended_by: tuple[str, ...] = ()) -> tuple[str, dict[str, Any]]:
    """Where a profile stands, and its values, those it extends included."""
    if profile in extended_by:
        circle = " → ".join((*extended_by, profile))
        raise ProfileError(f"profiles extend each other in a circle: {circle}")
    source, text = _text(profile, f" (which {extended_by[-1]} extends)" if extended_by else "")
    try:
        values = copy.deepcopy(_parsed(text))
    # PyYAML has plain errors of 2026-13-01, !!int, !!timestamp and !!bool x.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        mark, reason = getattr(error, "problem_mark", None), getattr(error, "problem", "")
        where = f"{source}:{mark.line + 1}" if mark else source
        reason = reason or " ".join(str(error).split())
        raise ProfileError(f"{where}: the file is not YAML: {reason}") from None
    if not isinstance(values, dict):
        raise ProfileError(f"{source}: expected keys and values, got {type(values).__name__}")
    if (base := values.pop("extends", None)) is not None:
        if str(base).endswith((".yaml", ".yml")):
            base = os.path.normpath(Path(profile).parent / str(base))
        values = _merged(_read(str(base), (*extended_by, profile))[1], values)
    return source, values


@functools.lru_cache
def _parsed(text: str) -> Any:
    """What a YAML text holds; PyYAML is slow, and all that extend a profile read it again."""
    return _Loader(text).get_single_data()


def _text(profile: str, by: str) -> tuple[str, str]:
    """Where a profile stands, and its YAML."""
    if profile.endswith((".yaml", ".yml")):
        path = Path(profile)
        try:
            if not path.is_file():
                raise ProfileError(f"profile file {path}{by} does not exist")
            return profile, path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ProfileError(f"profile file {path} cannot be read: {error}") from None
    if profile not in available():
        known = ", ".join(available())
        raise ProfileError(
            f"unknown profile {profile!r}{by}: known are {known}, or give a .yaml file"
        )
    return f"profiles/{profile}.yaml", (files(__package__) / f"{profile}.yaml").read_text("utf-8")


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` in it, mapping by mapping, which null removes; else replaced."""
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        if value is None and isinstance(below, dict):
            del merged[key]
            continue
        both = isinstance(value, dict) and isinstance(below, dict)
        merged[key] = _merged(below, value) if both else value  # type: ignore[arg-type]
    return merged
