"""Options of a command, defined once for Python callers and for the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

FIELD_DEFAULT: Any = object()
"""Marks a `CliOption` without a default of its own."""


@dataclass(frozen=True)
class CliOption:
    """How a field of `Options` appears on the command line. A field without a `CliOption` can be set in Python only.

    The attribute docstring of the field is the help text. A field with a `BeforeValidator` is parsed from text.
    """

    panel: str
    """Panel of the help."""
    name: str | None = None
    """Name, such as `--tile`; None is the name of the field."""
    metavar: str | None = None
    """Placeholder of the value in the help."""
    flag_value: Any = None
    """Value that the option sets, for an option that takes no value on the command line."""
    default: Any = FIELD_DEFAULT
    """Default of the command, if it differs from the default of the field."""


class Options(BaseModel):
    """Base class of options.

    Raises: ValueError, in one line that names the option, the value and what is expected.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    if not TYPE_CHECKING:  # type checkers know the parameters from the fields

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise ValueError("; ".join(map(self._explain, error.errors(include_url=False)))) from None

    @classmethod
    def cli_option(cls, field: str) -> CliOption | None:
        """Return how a field appears on the command line."""
        return next((item for item in cls.model_fields[field].metadata if isinstance(item, CliOption)), None)

    @classmethod
    def option_name(cls, field: str) -> str:
        """Return the name of a field in messages: `--tile`, or `block_tiles` for a field without an option."""
        option = cls.cli_option(field)
        return field if option is None else option.name or f"--{field.replace('_', '-')}"

    @classmethod
    def is_parsed(cls, field: str) -> bool:
        """Return True if the field parses its value from the text of the command line."""
        return any(isinstance(item, BeforeValidator) for item in cls.model_fields[field].metadata)

    @classmethod
    def _explain(cls, fault: Any) -> str:
        """Return one line for an error of pydantic."""
        if not fault["loc"]:  # a validator of the whole model names the options itself
            return str(fault["ctx"]["error"])
        field, context = fault["loc"][0], fault.get("ctx", {})
        if fault["type"] == "extra_forbidden":
            return f"option {field} is unknown, expected one of {', '.join(cls.model_fields)}"
        match fault["type"]:
            case "value_error":
                expected = str(context["error"])
            case "literal_error":
                expected = f"expected {context['expected'].replace(chr(39), '')}"
            case "greater_than_equal":
                expected = f"expected {context['ge']:g} or more"
            case "missing":
                expected = "expected more values"
            case _:
                expected = fault["msg"].replace("Input should be", "expected")
        return f"got {cls.option_name(field)} {cls._text(field, fault['input'])}, {expected}"

    @classmethod
    def _text(cls, field: str, value: Any) -> str:
        """Return a value as it is written on the command line."""
        if isinstance(value, tuple | list):
            separator = "," if cls.is_parsed(field) else " "
            return separator.join(cls._text(field, item) for item in value) or "(none)"
        return f"{value:g}" if isinstance(value, float) else str(value)
