"""The errors: the file shows their tree."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from close_engine import errors

ROOT_ERROR = errors.CloseEngineError


def test_the_file_opens_with_the_tree_of_its_classes() -> None:
    shown = re.findall(r"^    ( *\w+(?:, also an? \w+)?)$", errors.__doc__ or "", re.MULTILINE)

    assert shown == list(tree(ROOT_ERROR))


def test_the_classes_stand_in_the_order_of_the_tree() -> None:
    defined = re.findall(r"^class (\w+)", inspect.getsource(errors), re.MULTILINE)

    assert defined == [line.split()[0].rstrip(",") for line in tree(ROOT_ERROR)]


def tree(error: type[BaseException], depth: int = 0) -> Iterator[str]:
    """Return one line for each class in the file, below its base, with the built-in error that it also is."""
    builtin = [f", also {article(base)} {base.__name__}" for base in error.__bases__[1:]]
    yield "    " * depth + error.__name__ + "".join(builtin)
    for below in error.__subclasses__():
        if vars(errors).get(below.__name__) is below:
            yield from tree(below, depth + 1)


def article(base: type[BaseException]) -> str:
    return "an" if base.__name__[0] in "AEIOU" else "a"
