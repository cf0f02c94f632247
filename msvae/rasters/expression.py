"""Leaf masks by conditions on bands, such as `ndvi>0.3 and green<0.4`.

`otsu(ndvi)` means that NDVI is above the threshold of Otsu (1979) of the image. Python's own parser reads a condition.
The syntax tree may contain only a few kinds of nodes, and the condition is never run as code.
"""

from __future__ import annotations

import ast
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae.bands import RANGES_NM, Bands

INDEX_ROLES = {"ndvi": ("nir", "red"), "ndre": ("nir", "red_edge"), "gndvi": ("nir", "green")}
"""Normalised difference of two bands for each index. Negative reflectance counts as 0, so indices are in -1..1."""
OTSU = "otsu"
MAX_CHARS, MAX_DEPTH = 300, 30

ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
COMPARISONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
}
CONNECTIVES: dict[type, Callable[[Any, Any], Any]] = {ast.And: operator.and_, ast.Or: operator.or_}
WORDS: dict[type, tuple[str, str]] = {ast.BitAnd: ("&", "and"), ast.BitOr: ("|", "or"), ast.Invert: ("~", "not")}
"""Operators of NumPy, which bind tighter than comparisons, and the words to use instead."""


@dataclass(frozen=True)
class Expression:
    """A condition on bands. `finds_threshold` is True if it compares a quantity with Otsu's threshold.

    It names bands by their name, by their role (blue, green, red, red_edge, nir), or as an index (ndvi, ndre, gndvi).
    """

    text: str
    finds_threshold: bool

    @classmethod
    def parse(cls, text: str) -> Expression:
        """Parse `ndvi>0.3`, `(nir-red)/(nir+red)>0.3 and green<0.4` or `otsu(ndvi) and green<0.4`.

        Raises: ValueError if it holds anything but numbers, names, + - * /, comparisons, and, or, not, and one otsu().
        """
        text = text.strip()
        tree = _parse(text)
        if _check(tree, text) != "a condition":
            raise _refusal(text, f"{ast.unparse(tree)} is not a condition")
        num_calls = sum(isinstance(node, ast.Call) for node in ast.walk(tree))
        if num_calls > 1:
            raise _refusal(text, f"it holds {OTSU}() {num_calls} times, but an image has only one threshold")
        expression = cls(text, num_calls == 1)
        if not expression._names():
            raise _refusal(text, "it names no band")
        return expression

    def band_indices(self, bands: Bands) -> dict[str, int]:
        """Return the index of each band that the expression needs, by name or role.

        Raises: ValueError if the bands lack one of them.
        """
        needed: dict[str, int] = {}
        for name in self._names():
            for part in INDEX_ROLES.get(name.lower(), (name,)):
                try:
                    needed[part] = _find(part, bands)
                except ValueError as error:
                    first, second = INDEX_ROLES.get(name.lower(), (part, part))
                    need = name if first == second else f"{name.lower()} needs {first} and {second}"
                    raise ValueError(f"--mask {need}: {error}; choose other bands or mask files") from error
        return needed

    def otsu_text(self) -> str:
        """Return the part that finds a threshold, such as `otsu(ndvi)`."""
        return ast.unparse(self._otsu())

    def quantity(self, reflectance: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """Return the quantity (H, W) whose threshold is needed, NaN where it is not finite."""
        evaluation = _Evaluation(reflectance)
        value = evaluation.of(self._otsu().args[0])
        return np.where(evaluation.finite, value, np.nan)

    def leaf(self, reflectance: Mapping[str, NDArray[np.float64]], threshold: float | None = None) -> Any:
        """Return the leaf mask (H, W).

        A pixel is background if any intermediate result is not finite there, such as a quotient by 0.

        Args:
            reflectance: one array (H, W) for each band that `band_indices` names.
            threshold: Otsu's threshold, for expressions that need one.
        """
        evaluation = _Evaluation(reflectance, threshold)
        value = evaluation.of(_parse(self.text))
        return value & evaluation.finite

    def _otsu(self) -> ast.Call:
        return next(node for node in ast.walk(_parse(self.text)) if isinstance(node, ast.Call))

    def _names(self) -> list[str]:
        names = [node.id for node in ast.walk(_parse(self.text)) if isinstance(node, ast.Name) and node.id != OTSU]
        return list(dict.fromkeys(names))


class _Evaluation:
    """Evaluation of an expression over arrays. `finite` is True where all intermediate results are finite."""

    def __init__(self, reflectance: Mapping[str, NDArray[np.float64]], threshold: float | None = None) -> None:
        self._reflectance, self._threshold = reflectance, threshold
        self.finite: Any = np.ones(next(iter(reflectance.values())).shape, bool)

    def of(self, node: ast.expr) -> Any:
        """Return the value of a checked expression: an array, or a number if it names no band."""
        with np.errstate(all="ignore"):
            match node:
                case ast.Constant():
                    return np.float64(node.value)  # type: ignore[arg-type]
                case ast.Name():
                    return self._name(node.id)
                case ast.UnaryOp(op=ast.Not()):
                    return ~self.of(node.operand)
                case ast.UnaryOp():
                    return -self.of(node.operand)
                case ast.BinOp():
                    return self._checked(ARITHMETIC[type(node.op)](self.of(node.left), self.of(node.right)))
                case ast.BoolOp():
                    combined = self.of(node.values[0])
                    for value in node.values[1:]:
                        combined = CONNECTIVES[type(node.op)](combined, self.of(value))
                    return combined
                case ast.Compare():
                    sides = [self.of(side) for side in (node.left, *node.comparators)]
                    pairs = zip(node.ops, sides, sides[1:], strict=False)
                    holds = [COMPARISONS[type(op)](left, right) for op, left, right in pairs]
                    return np.logical_and.reduce(np.broadcast_arrays(*holds))
                case ast.Call():
                    assert self._threshold is not None
                    return self.of(node.args[0]) > self._threshold
        raise AssertionError(f"{type(node)} passed the check")

    def _name(self, name: str) -> Any:
        if name.lower() not in INDEX_ROLES:
            return self._checked(self._reflectance[name])
        first, second = (self._checked(self._reflectance[role]).clip(min=0) for role in INDEX_ROLES[name.lower()])
        return self._checked((first - second) / (first + second))

    def _checked(self, value: Any) -> Any:
        self.finite = self.finite & np.isfinite(value)
        return value


def _find(name: str, bands: Bands) -> int:
    """Return the index of a band by its name, else by its role, in upper or lower case."""
    if name in bands.names:
        return bands.names.index(name)
    if name.lower() in RANGES_NM:
        return bands.index(name.lower())
    lowered = [each.lower() for each in bands.names]
    if lowered.count(name.lower()) == 1:
        return lowered.index(name.lower())
    known = dict.fromkeys([*bands.names, *(role for role in RANGES_NM if bands.has(role)), *INDEX_ROLES])
    raise ValueError(f"{name} is not a band, expected one of {', '.join(known)}")


def _parse(text: str) -> ast.expr:
    if len(text) > MAX_CHARS:
        raise _refusal(f"{text[:20]}…", f"it is longer than {MAX_CHARS} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _refusal(text, "it cannot be read") from None


def _check(node: ast.expr, text: str, depth: int = 0) -> str:
    """Return the type of a node, `a number` or `a condition`. Raises: ValueError if a node is not allowed."""
    if depth > MAX_DEPTH:
        raise _refusal(text, f"it is nested more than {MAX_DEPTH} deep")
    kinds = [_check(child, text, depth + 1) for child in _children(node, text)]
    match node:
        case ast.Constant() | ast.Name():
            return "a number"
        case ast.UnaryOp(op=ast.Not()) | ast.BoolOp():
            expected, result = "a condition", "a condition"
        case ast.Compare() | ast.Call():
            expected, result = "a number", "a condition"
        case _:
            expected, result = "a number", "a number"
    if set(kinds) != {expected}:
        raise _refusal(text, f"{ast.unparse(node)} has an operand that is not {expected}")
    return result


def _children(node: ast.expr, text: str) -> Iterator[ast.expr]:
    """Iterate over the parts of a node. Raises: ValueError if the node is not allowed."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool) and _is_finite(value):
            return
        case ast.Name(id=name) if name != OTSU:
            return
        case ast.UnaryOp(op=ast.USub() | ast.Not()):
            yield node.operand
        case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div()):
            if isinstance(node.op, ast.Div) and isinstance(node.right, ast.Constant) and node.right.value == 0:
                raise _refusal(text, f"{ast.unparse(node)} divides by zero")
            yield from (node.left, node.right)
        case ast.BoolOp():
            yield from node.values
        case ast.Compare() if all(type(op) in COMPARISONS for op in node.ops):
            yield from (node.left, *node.comparators)
        case ast.Call(func=ast.Name(id=name), args=[quantity], keywords=[]) if name == OTSU:
            yield quantity
        case ast.Name() | ast.Call(func=ast.Name(id="otsu")):
            raise _refusal(text, f"{OTSU}() needs one quantity, such as {OTSU}(ndvi)")
        case ast.BinOp(op=op) | ast.UnaryOp(op=op) if type(op) in WORDS:
            sign, word = WORDS[type(op)]
            raise _refusal(text, f"{sign} is not allowed; write `{word}`")
        case _:
            raise _refusal(text, f"{ast.unparse(node)} is not allowed")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _refusal(text: str, why: str) -> ValueError:
    return ValueError(
        f"got --mask {text!r}: {why}; expected auto, or a condition such as 'ndvi>0.10 and green<0.4' or "
        f"'{OTSU}(ndvi) and green<0.4' (names of bands, {', '.join(INDEX_ROLES)}, numbers, + - * /, < <= > >=, and, "
        f"or, not, and {OTSU}() once)"
    )
