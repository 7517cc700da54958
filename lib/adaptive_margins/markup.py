"""Names and remarks from files of others, which pages show as they are."""

import re
from typing import Any

_ACTIVE = re.compile(
    r"<[A-Za-z/!?]"  # HTML
    r"|\{(?!(cite:[pt]|doc|ref|term)\}`)"  # directives and roles; substitutions, which run Jinja
    r"|`{3}|~{3}|:{3}|\$"  # fences; formulas, by which LaTeX opens files
    r"|!\[|\]\((?!https?://|#|(\.\./book/)?\w+\.(md|ipynb)\b)|^\s*\[[^\]]*\]:"  # files, scripts
    r"|[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]",  # control characters
    re.MULTILINE,
)


def active(value: Any) -> str:
    """What a page would act on in a text, or in keys and texts of a JSON value; "" if nothing."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple):
        return next(filter(None, map(active, value)), "")
    found = _ACTIVE.search(value) if isinstance(value, str) else None
    return f"{found[0]!r} in {value[:60]!r}: pages show this text, and would act" if found else ""
