"""What the keys of a profile have in common: kinds of values, and that unknown keys are errors."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, not yes or no")
    return value


Whole = Annotated[int, Field(strict=True)]
Number = Annotated[float, BeforeValidator(_number)]  # not strict: YAML reads 1e-6 as a text
Positive = Annotated[Whole, Field(gt=0)]
Seed = Annotated[Whole, Field(ge=0, lt=1 << 32)]  # as numpy takes them
Rate = Annotated[Number, Field(gt=0)]
Share = Annotated[Number, Field(ge=0, le=1)]


def _rate(value: Any) -> Any:
    text = str(value).strip()
    number = text.removesuffix("/B").strip()
    try:
        positive = 0 < float(number) < float("inf")
    except ValueError:
        positive = False
    if isinstance(value, bool) or not positive:
        raise ValueError(
            'expected a finite number greater than 0, or one divided by the batch size ("5e-6/B")'
        )
    return float(number) if text == number else f"{number}/B"


LearningRate = Annotated[float | str, BeforeValidator(_rate)]
"""A number, or a text such as "5e-6/B": divided by the run's batch size."""


class Settings(BaseModel):
    """A part of a profile: frozen, without infinite numbers."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _keys_are_known(cls, values: Any) -> Any:
        """As pydantic's extra="forbid", but naming the keys that there are."""
        if isinstance(values, dict) and (unknown := values.keys() - cls.model_fields.keys()):
            told = ", ".join(f"{key!r} (with value {values[key]!r})" for key in unknown)
            raise ValueError(f"unknown key {told}; known are {', '.join(cls.model_fields)}")
        return values
