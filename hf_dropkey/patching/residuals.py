"""Finds the residual branches of a layer by its code: which module's output is added to the residual, and where not.

The source of `forward` is followed once, line by line, with three kinds of values: the residual stream, the output of a
module (a branch), and everything else. A branch ends where it is added to the stream. Multiplying the output of its last module
by a number of each sample is then the same as multiplying the branch, because only linear steps lie in between.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn


# what a branch may pass between its last module and the sum: linear in it, and each sample by itself
LINEAR_NAMES = frozenset(
    {
        "clone", "contiguous", "cyclic_shift", "dropout", "flatten", "float", "permute", "reshape", "roll", "squeeze",
        "to", "transpose", "type", "type_as", "unflatten", "unsqueeze", "view", "window_reverse", "window_unpartition",
    }
)  # fmt: skip
LINEAR_MODULES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)
# of Transformers and timm, by parts of their names: a factor for each channel, another drop path, dropout
LINEAR_CLASSES = ("DropPath", "LayerScale", "Dropout", "StochasticDepth")
NORM = "Norm"
# calls its first argument, a method of the layer, with its last one
CHUNKING = "apply_chunking_to_forward"
# modules inside of modules whose code is followed; deeper ones are taken as a whole
DEPTH = 3


@dataclass(frozen=True)
class Stream:
    """What the layer was given, with the branches added so far, normalised or not."""


@dataclass(frozen=True)
class Branch:
    """The output of modules, by their names in the layer; `blocked` is what it passed that is not linear."""

    modules: tuple[str, ...]
    blocked: str | None = None


@dataclass(frozen=True)
class Other:
    """A value of another kind."""


Value = Stream | Branch | Other


@dataclass
class Residuals:
    """What was found in a layer.

    Attributes:
        branches: Names of the modules, in the layer, whose outputs are added to the residual stream.
        unreached: Names of others, with the reason.
    """

    branches: list[str] = field(default_factory=list)
    unreached: dict[str, str] = field(default_factory=dict)


def residuals_of(layer: nn.Module) -> Residuals:
    """The residual branches of a layer, in order of execution; none if its code cannot be read."""
    found = Residuals()
    _Reader(layer, "", found, DEPTH).read_forward({}, first=Stream())
    found.branches = list(dict.fromkeys(found.branches))
    found.unreached = {name: reason for name, reason in found.unreached.items() if name not in found.branches}
    return found


class _Reader:
    """Follows the code of one module of a layer."""

    def __init__(self, module: nn.Module, prefix: str, found: Residuals, depth: int) -> None:
        self.module, self.prefix, self.found, self.depth = module, prefix, found, depth

    def read_forward(self, given: Mapping[str | int, Value], *, first: Value | None = None) -> Value:
        """The value that `forward` returns for arguments by name or position; `first` is the first one."""
        return self.read_function(type(self.module).forward, {0: first, **given} if first is not None else given)

    def read_function(self, function: Any, given: Mapping[Any, Value]) -> Value:
        """The value that a method of the module returns."""
        tree = _tree(function)
        if tree is None:
            return Other()
        arguments = tree.args
        names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)][1:]
        names_only = [argument.arg for argument in arguments.kwonlyargs]
        values: dict[str, Value] = {
            name: given.get(place, given.get(name, Other())) for place, name in enumerate(names)
        }
        values |= {name: given.get(name, Other()) for name in names_only}
        returned: list[Value] = []
        self.statements(tree.body, values, returned)
        return next((value for value in returned if not isinstance(value, Other)), Other())

    def statements(self, body: list[ast.stmt], values: dict[str, Value], returned: list[Value]) -> None:
        for statement in body:
            if isinstance(statement, ast.Assign):
                value = self.value(statement.value, values)
                for target in statement.targets:
                    _assign(target, value, values)
            elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
                _assign(statement.target, self.value(statement.value, values), values)
            elif isinstance(statement, ast.AugAssign):
                before, change = self.value(statement.target, values), self.value(statement.value, values)
                _assign(statement.target, self.combined(statement.op, before, change), values)
            elif isinstance(statement, ast.Return) and statement.value is not None:
                returned.append(self.value(statement.value, values))
            elif isinstance(statement, ast.Expr):
                self.value(statement.value, values)
            elif isinstance(statement, ast.If):
                self.value(statement.test, values)
                branches = [dict(values), dict(values)]
                self.statements(statement.body, branches[0], returned)
                self.statements(statement.orelse, branches[1], returned)
                for name in branches[0].keys() | branches[1].keys():
                    values[name] = _either(branches[0].get(name, Other()), branches[1].get(name, Other()))
            elif isinstance(statement, ast.For | ast.While | ast.With | ast.Try):
                # a loop is followed once
                self.statements(statement.body, values, returned)

    def value(self, node: ast.expr, values: dict[str, Value]) -> Value:
        """The kind of value of an expression."""
        if isinstance(node, ast.Name):
            return values.get(node.id, Other())
        if isinstance(node, ast.BinOp):
            return self.combined(node.op, self.value(node.left, values), self.value(node.right, values))
        if isinstance(node, ast.Subscript | ast.Starred):
            return self.value(node.value, values)
        if isinstance(node, ast.IfExp):
            return _either(self.value(node.body, values), self.value(node.orelse, values))
        if isinstance(node, ast.Tuple | ast.List):
            kinds = [self.value(part, values) for part in node.elts]
            return kinds[0] if kinds else Other()
        if isinstance(node, ast.NamedExpr):
            value = self.value(node.value, values)
            _assign(node.target, value, values)
            return value
        return self.call(node, values) if isinstance(node, ast.Call) else Other()

    def combined(self, operator: ast.operator, left: Value, right: Value) -> Value:
        """The value of a sum or product; a branch that is added to the stream is found."""
        branch = next((one for one in (left, right) if isinstance(one, Branch)), None)
        stream = isinstance(left, Stream) or isinstance(right, Stream)
        if isinstance(operator, ast.Add) and stream:
            if branch is not None and branch.blocked is None:
                self.found.branches += branch.modules
            elif branch is not None:
                reason = f"its output passes {branch.blocked}, which is not linear, before it is added to the residual"
                self.found.unreached |= dict.fromkeys(branch.modules, reason)
            return Stream()
        if branch is None:
            return Other()
        if isinstance(operator, ast.Add) and isinstance(left, Branch) and isinstance(right, Branch):
            # attention and MLP side by side
            return Branch((*left.modules, *right.modules), left.blocked or right.blocked)
        if isinstance(operator, ast.Mult | ast.Div) and not (isinstance(left, Branch) and isinstance(right, Branch)):
            return branch
        return Branch(branch.modules, "a sum or product with other values")

    def call(self, node: ast.Call, values: dict[str, Value]) -> Value:
        given: dict[Any, Value] = {place: self.value(one, values) for place, one in enumerate(node.args)}
        given |= {one.arg: self.value(one.value, values) for one in node.keywords if one.arg is not None}
        called = _dotted(node.func)
        if called and called[0] == "self":
            found = _resolved(self.module, called[1:])
            if isinstance(found, nn.Module):
                return self.called_module(found, ".".join(called[1:]), given)
            if callable(found) and len(called) == 2 and called[1] not in LINEAR_NAMES:
                return self.called_method(called[1], given)
        if called and called[-1] == CHUNKING and node.args:
            method = _dotted(node.args[0])
            if len(method) == 2 and method[0] == "self":
                return self.called_method(method[1], {0: given[len(node.args) - 1]})
        name = called[-1] if called else node.func.attr if isinstance(node.func, ast.Attribute) else "a function"
        # of a method of a tensor, the tensor
        owner = self.value(node.func.value, values) if isinstance(node.func, ast.Attribute) else Other()
        subject = owner if not isinstance(owner, Other) else given.get(0, Other())
        if name in LINEAR_NAMES or isinstance(subject, Other):
            return subject
        return Branch(subject.modules, name) if isinstance(subject, Branch) else Other()

    def called_method(self, name: str, given: Mapping[Any, Value]) -> Value:
        function = getattr(type(self.module), name, None)
        if function is None or not self.depth or not any(isinstance(one, Stream | Branch) for one in given.values()):
            return Other()
        return _Reader(self.module, self.prefix, self.found, self.depth - 1).read_function(function, given)

    def called_module(self, module: nn.Module, name: str, given: Mapping[Any, Value]) -> Value:
        whole = f"{self.prefix}{name}"
        kind = type(module).__name__
        subject = next((one for one in given.values() if not isinstance(one, Other)), Other())
        if isinstance(module, LINEAR_MODULES) or any(part in kind for part in LINEAR_CLASSES):
            return subject
        if NORM in kind and isinstance(subject, Stream):
            return subject
        if self.depth and any(isinstance(one, Stream) for one in given.values()):
            inner = Residuals()
            value = _Reader(module, f"{whole}.", inner, self.depth - 1).read_forward(given)
            # a module that adds to the stream itself and returns it
            if isinstance(value, Stream) and (inner.branches or inner.unreached):
                self.found.branches += inner.branches
                self.found.unreached |= inner.unreached
                return value
        return Branch((whole,))


def _tree(function: Any) -> ast.FunctionDef | None:
    """The syntax tree of a function; None if its source is not there."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
        parsed = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    return parsed if isinstance(parsed, ast.FunctionDef) else None


def _assign(target: ast.expr, value: Value, values: dict[str, Value]) -> None:
    if isinstance(target, ast.Name):
        values[target.id] = value
    elif isinstance(target, ast.Tuple | ast.List) and target.elts:
        # of what attention returns, the first is the output
        _assign(target.elts[0], value, values)
        for other in target.elts[1:]:
            _assign(other, Other(), values)


def _either(one: Value, other: Value) -> Value:
    """The value after two ways through the code: the one that says more."""
    if isinstance(one, Branch) and isinstance(other, Branch) and one.blocked and not other.blocked:
        return other
    return other if isinstance(one, Other) else one


def _dotted(node: ast.expr) -> list[str]:
    """The parts of `self.a.b`; empty for other expressions."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return [node.id, *parts] if isinstance(node, ast.Name) else []


def _resolved(owner: Any, names: list[str]) -> Any:
    for name in names:
        owner = getattr(owner, name, None)
    return owner


def ancestors(name: str) -> Iterator[str]:
    """The modules around a module in a list, from the innermost on: `layers.0.blocks.1`, then `layers.0`."""
    parts = name.split(".")
    for place in reversed(range(len(parts))):
        if parts[place].isdigit():
            yield ".".join(parts[: place + 1])
