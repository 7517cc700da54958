"""The parameters of the notebooks: their types, and a check that names a value of another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from adaptive_margins.errors import AdaptiveMarginsError

_NUMBER = Annotated[float, Field(allow_inf_nan=False)]
_NATURAL = Annotated[int, Field(ge=0)]
_RATE = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_LISTED = Annotated[str, Field(pattern=r"^\d+(,\d+)*$")]
_NAMED = Annotated[str, Field(pattern="^(adaptive|distributed)$")]
_TEXT = Annotated[str, Field(pattern=r"\S")], "text"
_COUNT = Annotated[int, Field(ge=1)] | None, "a whole number from 1 on, or None"
PARAMETERS: dict[str, tuple[Any, str]] = {
    "profile": _TEXT,
    "data_folder": (str, "text, empty for no folder"),
    "source": _TEXT,
    "output": _TEXT,
    "model": _TEXT,
    "target": (_NUMBER | _NAMED, 'a number, "adaptive" or "distributed"'),
    "epsilon": (_NUMBER, "a number"),
    "query_set": (_TEXT[0] | None, "text or None"),
    "encoder": (_TEXT[0] | None, "text or None"),
    "first": (_NATURAL, "a whole number from 0 on"),
    "seed": (_NATURAL | None, "a whole number from 0 on, or None"),
    "seeds": (_NATURAL | _LISTED | None, 'whole numbers from 0 on, such as "1,2,3", or None'),
    "triples": _COUNT,
    "window": _COUNT,
    "patience": _COUNT,
    "draws": _COUNT,
    "learning_rate": (_RATE | None, "a number above 0, or None"),
}
"""Parameter of a notebook → its type, and that type in words."""


class ParameterError(AdaptiveMarginsError, ValueError):
    """A parameter of a notebook has a value of another type; the message names the expected one."""


def check_parameters(namespace: Mapping[str, Any]) -> None:
    """Check the parameters among the `globals` of a notebook.

    Raises:
        ParameterError: a parameter has a value of another type.
    """
    for name, (kind, words) in PARAMETERS.items():
        if name not in namespace:
            continue
        value = namespace[name]
        try:
            TypeAdapter(kind).validate_python(value, strict=True)
        except ValidationError:
            way_out = ""
            if words.startswith("text") and value is not None and not isinstance(value, str):
                way_out = f"; papermill passes {value} as text with -r in the place of -p"
            raise ParameterError(f"{name} is {value!r}; expected {words}{way_out}") from None
