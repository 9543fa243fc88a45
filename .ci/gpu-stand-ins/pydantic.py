"""What kvstore_s3's settings use of pydantic: models of plain fields, bounds, and errors that name the field.

Values must have the type of their field (a string for a path, an int for a float): nothing is read out of strings.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from pydantic_core import PydanticCustomError

_MISSING: Any = object()
_BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "ge": ("greater than or equal to", lambda value, bound: value >= bound),
    "gt": ("greater than", lambda value, bound: value > bound),
    "le": ("less than or equal to", lambda value, bound: value <= bound),
    "lt": ("less than", lambda value, bound: value < bound),
    "multiple_of": ("a multiple of", lambda value, bound: value % bound == 0),
}


class ValidationError(ValueError):
    def __init__(self, errors: list[dict[str, Any]]) -> None:
        super().__init__("; ".join(f"{'.'.join(error['loc'])}: {error['msg']}" for error in errors))
        self._errors = errors

    def errors(self) -> list[dict[str, Any]]:
        return self._errors


@dataclass(frozen=True)
class AfterValidator:
    func: Callable[[Any], Any]


@dataclass(frozen=True)
class FieldInfo:
    default: Any = _MISSING
    default_factory: Callable[[], Any] | None = None
    bounds: Mapping[str, Any] = field(default_factory=dict)

    def draw(self) -> Any:
        return self.default_factory() if self.default_factory is not None else self.default


def Field(default: Any = _MISSING, *, default_factory: Callable[[], Any] | None = None, **bounds: Any) -> Any:  # noqa: N802
    if unknown := bounds.keys() - _BOUNDS.keys():
        raise TypeError(f"this stand-in for pydantic knows no {', '.join(sorted(unknown))}")
    return FieldInfo(default, default_factory, bounds)


class BaseModel:
    model_config: ClassVar[Mapping[str, Any]] = {}
    model_fields: ClassVar[dict[str, FieldInfo]] = {}

    def __init_subclass__(cls) -> None:
        hints = get_type_hints(cls, include_extras=True)
        hints = {name: hint for name, hint in hints.items() if get_origin(hint) is not ClassVar and name[0] != "_"}
        cls.model_fields = {name: _field_of(getattr(cls, name, _MISSING)) for name in hints}
        cls._hints = hints

    def __init__(self, **given: Any) -> None:
        values, errors = {}, []
        for name in given.keys() - self.model_fields.keys():
            errors.append(_error("extra_forbidden", name, "Extra inputs are not permitted", given[name]))
        for name, info in self.model_fields.items():
            if name not in given and info.draw() is _MISSING:
                errors.append(_error("missing", name, "Field required", given))
                continue
            try:
                values[name] = _check(self._hints[name], given[name]) if name in given else info.draw()
            except PydanticCustomError as error:
                errors.append(_error(error.type, name, str(error), given[name]))
        if errors:
            raise ValidationError(errors)
        self.__dict__.update(values)

    def __setattr__(self, name: str, value: Any) -> None:
        raise ValidationError([_error("frozen_instance", name, "Instance is frozen", value)])

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__.items()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"

    def model_copy(self, *, update: Mapping[str, Any] = types.MappingProxyType({})) -> Self:
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__ | dict(update))
        return copy


def _field_of(default: Any) -> FieldInfo:
    return default if isinstance(default, FieldInfo) else FieldInfo(default)


def _error(kind: str, name: str, message: str, value: Any) -> dict[str, Any]:
    return {"type": kind, "loc": (name,), "msg": message, "input": value}


def _check(hint: Any, value: Any) -> Any:
    """The value as the field has it. Raises `PydanticCustomError`."""
    origin = get_origin(hint)
    if origin is Annotated:
        inner, *extras = get_args(hint)
        value = _check(inner, value)
        for extra in extras:
            value = _apply(extra, value)
        return value
    if origin is Literal:
        if value in get_args(hint):
            return value
        raise PydanticCustomError("literal_error", f"Input should be {' or '.join(map(repr, get_args(hint)))}")
    if origin in (Union, types.UnionType):
        return _check_union(get_args(hint), value)
    return _check_type(hint, value)


def _check_union(hints: tuple[Any, ...], value: Any) -> Any:
    if value is None and type(None) in hints:
        return None
    kinds = [hint for hint in hints if hint is not type(None)]
    if len(kinds) != 1:
        raise TypeError("this stand-in for pydantic knows no union but that with None")
    return _check(kinds[0], value)


def _check_type(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind or (kind is Path and isinstance(value, Path)):
        return value
    raise PydanticCustomError(f"{kind.__name__}_type", f"Input should be a valid {kind.__name__}")


def _apply(extra: Any, value: Any) -> Any:
    if isinstance(extra, AfterValidator):
        return extra.func(value)
    if not isinstance(extra, FieldInfo):
        raise TypeError(f"this stand-in for pydantic knows no {extra!r}")
    for name, bound in extra.bounds.items():
        words, holds = _BOUNDS[name]
        if not holds(value, bound):
            raise PydanticCustomError(name, f"Input should be {words} {bound}")
    return value
