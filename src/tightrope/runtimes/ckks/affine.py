"""The linear ops of a Program as sparse matrices over flattened values, and how they compose."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from tightrope.ops import Shape
from tightrope.program import (
    Add,
    AvgPool2d,
    Concat,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    Linear,
    Op,
    Pad,
    Program,
    Upsample,
)

Matrix = Any  # scipy.sparse.csr_array
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Sum:
    """bias + the sum over `terms` of matrix times source.

    dense: it holds a layer, not only a pooling. copy_of: the source that it is, whatever its shape.
    """

    terms: Mapping[str, Matrix]
    bias: Vector
    dense: bool = False
    copy_of: str | None = None


def source(name: str, size: int) -> Sum:
    return Sum({name: sp.eye_array(size, format="csr")}, np.zeros(size), copy_of=name)


def is_dense(op: Op) -> bool:
    """Whether an op mixes channels or pixels with weights: two of these are not merged into one."""
    return isinstance(op, Linear) or (isinstance(op, Conv2d) and (op.kernel != (1, 1) or op.groups == 1))


def compose(op: Op, program: Program, inputs: Sequence[Sum]) -> Sum:
    """What a linear op makes of sums. Without weights in the program, ones stand for them."""
    shapes = [program.shape(value) for value in op.inputs]
    matrices, bias = MATRICES[type(op)](op, _tensors(program, op), shapes)
    terms: dict[str, Matrix] = {}
    for matrix, inner in zip(matrices, inputs, strict=True):
        bias = bias + matrix @ inner.bias
        for name, factor in inner.terms.items():
            product = matrix if inner.copy_of else _times(matrix, factor)
            terms[name] = _plus(terms[name], product) if name in terms else product
    copy_of = inputs[0].copy_of if isinstance(op, Flatten) else None
    return Sum(terms, bias, is_dense(op) or any(inner.dense for inner in inputs), copy_of)


def scaled(total: Sum, factor: Vector, shift: Vector) -> Sum:
    """(total + shift) * factor, element by element."""
    terms = {}
    for name, matrix in total.terms.items():
        rows = matrix.tocsr()
        data = rows.data * np.repeat(factor, np.diff(rows.indptr))
        terms[name] = sp.csr_array((data, rows.indices, rows.indptr), shape=rows.shape)
    return Sum(terms, (total.bias + shift) * factor, total.dense)


def spread(total: Sum, size: int) -> Sum:
    """One factor a channel as a map of `size` elements; a sum of that size as it is."""
    repeats = size // len(total.bias)
    if repeats == 1:
        return total
    copies = np.repeat(np.arange(len(total.bias)), repeats)
    terms = {name: matrix.tocsr()[copies] for name, matrix in total.terms.items()}
    return Sum(terms, total.bias[copies], total.dense)


def plus(a: Sum, b: Sum) -> Sum:
    terms = dict(a.terms)
    for name, matrix in b.terms.items():
        terms[name] = _plus(terms[name], matrix) if name in terms else matrix
    return Sum(terms, a.bias + b.bias, a.dense or b.dense)


def _times(a: Matrix, b: Matrix) -> Matrix:
    """Keeps zeros, which scipy's product drops: which diagonals there are must not tell of zero weights."""
    product, pattern = (a @ b).tocsr(), (_ones(a) @ _ones(b)).tocsr()
    if product.nnz == pattern.nnz:
        return product
    pattern.data[:] = 0
    return _plus(pattern, product)


def _ones(a: Matrix) -> Matrix:
    return sp.csr_array((np.ones_like(a.data), a.indices, a.indptr), shape=a.shape)


def _plus(a: Matrix, b: Matrix) -> Matrix:
    """Keeps zeros, as `_times`."""
    a, b = a.tocoo(), b.tocoo()
    where = (np.concatenate([a.row, b.row]), np.concatenate([a.col, b.col]))
    return sp.csr_array((np.concatenate([a.data, b.data]), where), shape=a.shape)


def _tensors(program: Program, op: Op) -> tuple[Vector, Vector] | None:
    if not isinstance(op, Conv2d | Linear):
        return None
    if not program.tensors:
        return np.ones(op.weight_shape), np.zeros(op.weight_shape[0])
    weight, bias = (np.asarray(program.tensors[f"{op.name}.{part}"]) for part in ("weight", "bias"))
    return weight.astype(np.float64), bias.astype(np.float64)


Made = tuple[list[Matrix], Vector]


def _csr(rows: Any, columns: Any, values: Any, out: Shape, into: Shape) -> Matrix:
    shape = (math.prod(out), math.prod(into))
    rows, columns, values = (a.reshape(-1) for a in np.broadcast_arrays(rows, columns, values))
    return sp.csr_array((values, (rows, columns)), shape=shape)


def _conv(op: Conv2d, w: tuple[Vector, Vector], shapes: list[Shape]) -> Made:
    (C, H, W), (out, h, w_out) = shapes[0], op.shape
    o, c, i, j, y, x = np.ogrid[:out, : C // op.groups, : op.kernel[0], : op.kernel[1], :h, :w_out]
    row = y * op.stride[0] + i * op.dilation[0] - op.padding[2]
    column = x * op.stride[1] + j * op.dilation[1] - op.padding[0]
    channel = o // (out // op.groups) * (C // op.groups) + c
    inside = np.broadcast_to(
        (row >= 0) & (row < H) & (column >= 0) & (column < W),
        (out, C // op.groups, *op.kernel, h, w_out),
    )
    rows, columns, values = np.broadcast_arrays(
        (o * h + y) * w_out + x, (channel * H + row) * W + column, w[0][..., None, None]
    )
    matrix = _csr(rows[inside], columns[inside], values[inside], op.shape, shapes[0])
    return [matrix], np.repeat(w[1], h * w_out)


def _linear(op: Linear, w: tuple[Vector, Vector], shapes: list[Shape]) -> Made:
    rows = math.prod(shapes[0][:-1])
    block, out, into = np.ogrid[:rows, : op.shape[-1], : op.in_features]
    row, column = block * op.shape[-1] + out, block * op.in_features + into
    return [_csr(row, column, w[0], op.shape, shapes[0])], np.tile(w[1], rows)


def _same(op: Op, w: None, shapes: list[Shape]) -> Made:
    size = math.prod(op.shape)
    return [sp.eye_array(size, format="csr") for _ in shapes], np.zeros(size)


def _concat(op: Concat, w: None, shapes: list[Shape]) -> Made:
    size, start, matrices = math.prod(op.shape), 0, []
    for shape in shapes:
        count = math.prod(shape)
        matrices.append(_csr(start + np.arange(count), np.arange(count), np.ones(count), op.shape, shape))
        start += count
    return matrices, np.zeros(size)


def _separable(op: Op, down: Matrix, across: Matrix, channels: int) -> Made:
    """The same map of rows and of columns in every channel."""
    plane = sp.kron(sp.csr_array(down), sp.csr_array(across))
    return [sp.kron(sp.eye_array(channels), plane).tocsr()], np.zeros(math.prod(op.shape))


def _avg_pool(op: AvgPool2d, w: None, shapes: list[Shape]) -> Made:
    """The divisor is a product too: of the window's parts inside the map, or inside map and padding."""
    sides = [
        _windows(
            shapes[0][1 + a], op.shape[1 + a], op.kernel[a], op.stride[a], op.padding[a], op.count_padding
        )
        for a in (0, 1)
    ]
    return _separable(op, sides[0], sides[1], op.shape[0])


def _windows(size: int, count: int, kernel: int, stride: int, padding: int, count_padding: bool) -> Vector:
    matrix = np.zeros((count, size))
    for k in range(count):
        start = k * stride - padding
        stop = min(start + kernel, size + padding)
        inside = slice(max(start, 0), min(stop, size))
        matrix[k, inside] = 1 / (stop - start if count_padding else inside.stop - inside.start)
    return matrix


def _global_avg_pool(op: GlobalAvgPool, w: None, shapes: list[Shape]) -> Made:
    C, H, W = shapes[0]
    return _separable(op, np.full((1, H), 1 / H), np.full((1, W), 1 / W), C)


def _pad(op: Pad, w: None, shapes: list[Shape]) -> Made:
    C, H, W = shapes[0]
    left, _, top, _ = op.padding
    return _separable(op, np.eye(op.shape[1], H, -top), np.eye(op.shape[2], W, -left), C)


def _upsample(op: Upsample, w: None, shapes: list[Shape]) -> Made:
    C, H, W = shapes[0]
    return _separable(op, _enlarged(H, op.factor[0], op.mode), _enlarged(W, op.factor[1], op.mode), C)


def _enlarged(size: int, factor: int, mode: str) -> Vector:
    """Nearest, or bilinear with align_corners=False, along one side."""
    if mode == "nearest":
        return np.repeat(np.eye(size), factor, axis=0)
    at = np.clip((np.arange(size * factor) + 0.5) / factor - 0.5, 0, size - 1)
    low = np.minimum(at.astype(int), max(size - 2, 0))
    matrix = np.zeros((size * factor, size))
    np.add.at(matrix, (np.arange(size * factor), low), 1 - (at - low))
    np.add.at(matrix, (np.arange(size * factor), np.minimum(low + 1, size - 1)), at - low)
    return matrix


MATRICES: dict[type[Op], Callable[..., Made]] = {
    Conv2d: _conv,
    Linear: _linear,
    Add: _same,
    Concat: _concat,
    AvgPool2d: _avg_pool,
    GlobalAvgPool: _global_avg_pool,
    Pad: _pad,
    Upsample: _upsample,
    Flatten: _same,
}
