"""Choosing an adapter method: `--method NAME` and that method's own options as flags.

A method is a dataclass and its options are its fields: their types say how words are read, and their help is what
the class docstring says about them as `name: text`. So a method has nothing to do for the command line.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Self

import tyro

from jora.cli.options import CommandOptions, json_list, json_object, option_names

if TYPE_CHECKING:
    from jora.methods.method import Method

DEFAULT = "lora"


@dataclass(frozen=True, kw_only=True)
class MethodChoice(CommandOptions):
    """A command that takes a method with its options."""

    method: str = DEFAULT
    """Replaced by `completed`, which knows the methods."""
    method_options: Any = None
    """The options of the chosen method: replaced by `completed`."""

    @classmethod
    def completed(cls, value_of: Callable[[str], str | None]) -> type[Self]:
        """This command with the options of the method that was chosen.

        Raises:
            InputError: there is no such method.
        """
        from jora.methods import registry

        made = _with_method(cls, value_of("method") or DEFAULT, tuple(registry.names()))  # type: ignore[arg-type]
        return typing.cast("type[Self]", made)

    @classmethod
    def explain(cls, name: str) -> str | None:
        """Which other methods have this option."""
        from jora.methods import registry

        others = [other for other in registry.names() if name in option_names(registry.method_class(other))]
        if not others:
            return None
        chosen = next(field.default for field in dataclasses.fields(cls) if field.name == "method")
        return f"the method is {chosen}, and this is an option of {', '.join(others)}"

    def build_method(self) -> Method:
        """The method with the options that were given. Raises InputError for values that it refuses."""
        from jora.methods import registry

        return registry.method_class(self.method)(**vars(self.method_options))

    def chooses_method(self) -> bool:
        """Whether the method or one of its options differs from the default."""
        return self.method != DEFAULT or self.method_options != type(self.method_options)()


@functools.cache
def _with_method(cls: type[MethodChoice], name: str, known: tuple[str, ...]) -> type[MethodChoice]:
    """`cls` with the options of method `name`; `known` are all methods, of which more may be registered later."""
    from jora.methods import registry

    group = options_of(registry.method_class(name))
    if shared := set(option_names(group)) & set(option_names(cls)):
        raise ValueError(f"method {name}: its option {min(shared)!r} has the name of an option of the command itself")
    text = f"How to adapt: {', '.join(known)}. `--method NAME --help` shows that method's options."
    title = tyro.conf.arg(name=name, help=group.__doc__)
    group_field = dataclasses.field(default_factory=group) if _has_defaults(group) else dataclasses.field()
    fields: list[tuple[str, Any, Any]] = [
        ("method", Annotated[str, tyro.conf.arg(help=text)], dataclasses.field(default=name)),
        ("method_options", Annotated[group, tyro.conf.OmitArgPrefixes, title], group_field),
    ]
    made = dataclasses.make_dataclass(cls.__name__, fields, bases=(cls,), frozen=True, kw_only=True)
    made.__doc__ = cls.__doc__
    return made


def _has_defaults(cls: type) -> bool:
    missing = dataclasses.MISSING
    return all(
        field.default is not missing or field.default_factory is not missing for field in dataclasses.fields(cls)
    )


@functools.cache
def options_of(method: type[Method]) -> type:
    """The options of a method as a dataclass for the command line: `build_method` makes the method of it."""
    hints = typing.get_type_hints(method)
    texts = _texts(method)
    fields = [
        (
            field.name,
            Annotated[_in_words(hints[field.name]), _shown(hints[field.name], texts.get(field.name, ""))],
            dataclasses.field(default=field.default, default_factory=field.default_factory),
        )
        for field in dataclasses.fields(method)  # type: ignore[arg-type]  # every method is a dataclass
    ]
    made = dataclasses.make_dataclass("MethodOptions", fields, frozen=True)
    made.__doc__ = inspect.cleandoc(method.__doc__ or method.name).partition("\n\n")[0]
    return made


def _one_or_many(hint: Any) -> type | None:
    """The X of a union with both X and Sequence[X]."""
    members = typing.get_args(hint)
    items = [typing.get_args(member)[0] for member in members if typing.get_origin(member) is collections.abc.Sequence]
    return next((item for item in items if item in members), None)


def _shown(hint: Any, text: str) -> Any:
    """The help of an option; one or many of a kind are shown as that, without their form as JSON."""
    item = _one_or_many(hint)
    word = item and item.__name__.upper()
    return tyro.conf.arg(help=text, metavar=f"{word} [{word} ...]" if word else None)


def _in_words(hint: Any) -> Any:
    """A type as words of a command line give it: a sequence is a tuple; JSON, where words would be ambiguous."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        item = _one_or_many(hint)
        json = [Annotated[tuple[item, ...], json_list(item)]] if item else []  # type: ignore[valid-type]
        return typing.Union[(*json, *map(_in_words, inner))]  # made of a list
    if origin is collections.abc.Sequence:
        return tuple[inner[0], ...]  # type: ignore[valid-type]
    if origin is collections.abc.Mapping and typing.get_origin(inner[1]) is collections.abc.Sequence:
        return Annotated[hint, json_object(typing.get_args(inner[1])[0])]
    return hint


def _texts(cls: type) -> dict[str, str]:
    """What the docstrings of a dataclass and its bases say about each field: paragraphs of `name: text`, `a, b: text`.

    A text ends where the next field's begins, or with its paragraph.
    """
    found: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        name = "|".join(field.name for field in dataclasses.fields(base))
        heading = re.compile(rf"(?:^|(?<=\s))((?:{name})(?:(?:, | and | / )(?:{name}))*): ")
        for paragraph in inspect.cleandoc(base.__doc__ or "").split("\n\n"):
            _, *parts = heading.split(" ".join(paragraph.split()))
            for names, text in zip(parts[::2], parts[1::2], strict=True):
                found |= dict.fromkeys(re.split(", | and | / ", names), (text[:1].upper() + text[1:]).strip())
    return found
