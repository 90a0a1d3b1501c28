"""What the body of each loop in an optimised HLO module of XLA:GPU reads, writes and multiplies.

A lower bound from shapes: every kernel reads its operands and writes its results once. An operand of which a kernel
takes a slice counts as the slice, an array that it updates in place as the update, gathered rows as what is gathered.
Kernels written in Triton are opaque and count as nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_COMPUTATION = re.compile(r"(?:ENTRY )?%?(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?(\S+) = (\(.*?\)|\S+) ([a-z][a-z0-9-]*)\((.*)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)')
_WORKSPACE = ", s8["  # the last result of a cuBLAS or cuDNN call
_SAME = ("bitcast", "copy", "reshape")
_FUSIONS = ("fusion", "fusion-start", "async-start")


class Instruction(NamedTuple):
    name: str
    shape: str
    operation: str
    operands: list[str]
    line: str
    root: bool

    @property
    def calls(self) -> str | None:
        """The computation that a fusion consists of."""
        found = re.search(r"calls=%?([\w.\-]+)", self.line)
        return found.group(1) if found else None


class Body(NamedTuple):
    """One pass over a loop's body; bytes, FLOPs of matrix products, and how many kernels and library calls."""

    name: str
    read: int
    written: int
    flops: int
    kernels: int


def loop_bodies(text: str) -> list[Body]:
    """The bodies of all loops that run kernels, in the order of the module."""
    module = _computations(text)
    names = dict.fromkeys(re.findall(r"body=%?([\w.\-]+)", text))
    return [found for name in names if (found := _body(module, name)).kernels]


def _computations(text: str) -> dict[str, list[Instruction]]:
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = found.setdefault(head.group(1), [])
        elif part := _INSTRUCTION.match(line):
            root, name, shape, operation, rest = part.groups()
            current.append(Instruction(name, shape, operation, _operands(rest), line, bool(root)))
    return found


def _operands(rest: str) -> list[str]:
    """Names up to the bracket that closes the list of operands."""
    depth, end = 1, 0
    while depth and end < len(rest):
        depth += {"(": 1, ")": -1}.get(rest[end], 0)
        end += 1
    plain = re.sub(r"/\*.*?\*/", "", rest[: end - 1])
    return [name.strip().lstrip("%") for name in plain.split(",") if name.strip()]


def _size(shape: str) -> int:
    return sum(_BYTES.get(kind, 0) * math.prod(_dimensions(sizes)) for kind, sizes in _ARRAY.findall(shape))


def _dimensions(sizes: str) -> list[int]:
    return [int(size) for size in sizes.split(",") if size]


def _body(module: dict[str, list[Instruction]], name: str) -> Body:
    shapes = {each.name: each.shape for each in module[name]}
    read = written = flops = kernels = 0
    for each in module[name]:
        if each.operation in _FUSIONS and each.calls in module:
            r, w = _fusion(module, each.calls)
            flops += _flops(module, module[each.calls])
        elif each.operation == "copy":
            r = w = _size(each.shape)
        elif each.operation == "custom-call":
            triton = "triton" in each.line
            r = 0 if triton else sum(_size(shapes.get(operand, "")) for operand in each.operands)
            w = 0 if triton else _size(each.shape.split(_WORKSPACE)[0])
            flops += _flops(module, [each], shapes)
        else:
            continue
        read, written, kernels = read + r, written + w, kernels + 1
    return Body(name, read, written, flops, kernels)


def _flops(
    module: dict[str, list[Instruction]], inside: list[Instruction], shapes: dict[str, str] | None = None
) -> int:
    """Of the products among these instructions, nested fusions included."""
    shapes = shapes or {each.name: each.shape for each in inside}
    total = 0
    for each in inside:
        if each.operation == "dot" or ("__cublas" in each.line and each.operation == "custom-call"):
            contracted, left = _CONTRACTED.search(each.line), _ARRAY.search(shapes[each.operands[0]])
            out = _ARRAY.search(each.shape)
            assert contracted and left and out
            sizes = _dimensions(left.group(2))
            depth = math.prod(sizes[axis] for axis in _dimensions(contracted.group(1).replace('"', "")))
            total += 2 * depth * math.prod(_dimensions(out.group(2)))
        elif each.operation == "fusion" and each.calls in module:
            total += _flops(module, module[each.calls])
    return total


def _fusion(module: dict[str, list[Instruction]], name: str) -> tuple[int, int]:
    """Bytes (read, written) of a fused computation."""
    inside = module[name]
    nested = [each for each in inside if each.operation == "fusion"]
    if len(nested) == 1 and len(inside) == 1 + sum(each.operation == "parameter" for each in inside):
        return _fusion(module, nested[0].calls or "")  # the wrapper of an asynchronous one
    by_name = {each.name: each for each in inside}
    read = sum(_taken(inside, each) for each in inside if each.operation == "parameter")
    root = next(each for each in inside if each.root)
    return read, _result(root, lambda operand: by_name[operand])


def _taken(inside: list[Instruction], array: Instruction) -> int:
    """Bytes of an array that its users in a fusion read."""
    total = 0
    for user in inside:
        if array.name not in user.operands:
            continue
        first = user.operands[0] == array.name
        if user.operation in ("dynamic-slice", "gather") and first:
            total += _size(user.shape)
        elif user.operation in _SAME:
            total += _taken(inside, user)
        elif not (user.operation == "tuple" or (user.operation in ("dynamic-update-slice", "scatter") and first)):
            return _size(array.shape)
    return min(total, _size(array.shape))


def _result(root: Instruction, of: Callable[[str], Instruction]) -> int:
    """Bytes that a fusion writes."""
    if root.operation == "tuple":
        return sum(_result(of(operand), of) for operand in root.operands)
    if root.operation == "bitcast":
        return _result(of(root.operands[0]), of)
    if root.operation == "get-tuple-element" and root.shape.startswith("s8["):
        return 0  # the workspace of the library call that it comes from
    if root.operation == "dynamic-update-slice":
        return _size(of(root.operands[1]).shape)
    if root.operation == "scatter":
        return _size(of(root.operands[-1]).shape)
    return _size(root.shape.split(_WORKSPACE)[0])
