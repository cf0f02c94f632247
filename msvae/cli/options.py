"""Command line options that are made from the fields of an `Options` class, so that an option is defined once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from msvae.cli.screen import user_errors
from msvae.options import FIELD_DEFAULT, CliOption, Options


def option(panel: str, text: str, *names: str, **settings: Any) -> Any:
    """Return a typer option in a panel of the help."""
    return typer.Option(*names, help=text, rich_help_panel=panel, **settings)


def with_options(model: type[Options]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace the parameter `options` of a command by one command line option per `CliOption` field of `model`.

    The command receives `model(...)` with the given values; if one is invalid, the command ends with one line and exit
    code 2. In each panel of the help, options of the command come before fields of the model.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [parameter for name, parameter in signature.parameters.items() if name != "options"]
        fields = {name: item for name in model.model_fields if (item := model.cli_option(name)) is not None}
        parameters = [*own, *(_parameter(model, name, item) for name, item in fields.items())]
        panels = dict.fromkeys([None, *(item.panel for item in fields.values()), *map(_panel, own)])
        parameters.sort(key=lambda item: list(panels).index(_panel(item)))

        @wraps(command)
        def with_model(**values: Any) -> None:
            with user_errors():
                options = _build(model, {name: values.pop(name) for name in fields})
            command(**values, options=options)

        # typer reads both
        with_model.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        with_model.__annotations__ = {item.name: item.annotation for item in parameters}
        return with_model

    return decorate


def _panel(parameter: inspect.Parameter) -> str | None:
    """Return the panel of an option, or None for an argument."""
    panels = (getattr(item, "rich_help_panel", None) for item in getattr(parameter.annotation, "__metadata__", ()))
    return next(filter(None, panels), None)


def _parameter(model: type[Options], name: str, item: CliOption) -> inspect.Parameter:
    field = model.model_fields[name]
    annotation, default, metavar = field.annotation, field.default, item.metavar
    if item.flag_value is not None:
        annotation, default = bool, False
    elif model.is_parsed(name):
        annotation, default = str | None, None
    elif get_origin(annotation) is Literal:
        annotation, metavar = str, "|".join(get_args(annotation))
    if item.default is not FIELD_DEFAULT:
        default = item.default
    text = " ".join((field.description or "").split())
    made = option(item.panel, text, model.option_name(name), metavar=metavar)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, made]
    )


def _build(model: type[Options], given: dict[str, Any]) -> Options:
    """Return the options with the values of a command line. An option that is not given has its default."""
    values = {}
    for name, value in given.items():
        item = model.cli_option(name)
        assert item is not None
        if item.flag_value is not None:
            value = item.flag_value if value else None
        if value is not None or item.default is None:
            values[name] = value
    return model(**values)
