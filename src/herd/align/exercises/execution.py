"""Running the little programs that our own generators build: an allow-list over the syntax tree, then `exec`.

Only text made in this package ever comes here, never text from a user or a model. The allow-list is a second lock:
a generator that by mistake builds an import, an attribute with an underscore or an endless loop is stopped before
anything runs. (What cannot be expressed: import, while, class, with, global, decorators, double-underscore names.)
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable

from herd.errors import HerdError

_SYNTAX = (
    "Module Expr Assign AugAssign FunctionDef Return If For Try ExceptHandler "
    "BinOp UnaryOp BoolOp Compare Call IfExp Lambda JoinedStr FormattedValue "
    "Name Attribute Constant Subscript Slice Starred keyword arguments arg "
    "List Tuple Set Dict ListComp DictComp SetComp GeneratorExp comprehension "
    "Load Store Add Sub Mult Div FloorDiv Mod Pow UAdd USub Not And Or "
    "Eq NotEq Lt LtE Gt GtE In NotIn Is IsNot"
)
_BUILTIN_NAMES = (
    "abs all any bool chr dict divmod enumerate float int isinstance len list map max min ord "
    "range repr reversed round set sorted str sum tuple type zip Exception"
)
_NODES: frozenset[type[ast.AST]] = frozenset(getattr(ast, name) for name in _SYNTAX.split())
_BUILTINS: dict[str, object] = {name: getattr(builtins, name) for name in _BUILTIN_NAMES.split()}


def run_program(source: str) -> str:
    """What the program prints, without the last line end.

    Raises HerdError if the program uses anything outside the allow-list, or fails while it runs."""
    try:
        tree = ast.parse(source)
        _check(tree, source)
        lines: list[str] = []
        exec(compile(tree, "<exercise>", "exec"), {"__builtins__": {**_BUILTINS, "print": _printer(lines)}})
    except HerdError:
        raise
    except Exception as error:
        raise HerdError(
            f"an exercise's program failed with {type(error).__name__}: {error}",
            value=source,
            allowed="a program that runs to its end",
        ) from error
    return "".join(lines).removesuffix("\n")


def _printer(lines: list[str]) -> Callable[..., None]:
    def write(*values: object, sep: str = " ", end: str = "\n") -> None:
        lines.append(sep.join(map(str, values)) + end)

    return write


def _check(tree: ast.AST, source: str) -> None:
    for node in ast.walk(tree):
        if type(node) not in _NODES:
            what = f"an exercise's program uses {type(node).__name__}"
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and node.attr != "__name__":
            what = f"an exercise's program reads the private attribute {node.attr}"
        elif isinstance(node, ast.Name) and node.id.startswith("__"):
            what = f"an exercise's program reads the private name {node.id}"
        elif isinstance(node, ast.FunctionDef) and node.decorator_list:
            what = "an exercise's program uses a decorator"
        else:
            continue
        raise HerdError(what, value=source, allowed="expressions, assignments, small functions, if, for, try")
