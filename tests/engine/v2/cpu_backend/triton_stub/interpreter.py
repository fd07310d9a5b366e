"""Triton's interpreter, fast enough to sample thousands of requests and able to run all of vLLM's sampling kernels.

The interpreter runs the programs of a grid one after another at some 20 us an operation: minutes for a thousand
requests. Here many programs run at once: a scalar is an array [G, 1] over G programs, a block of N values is [G, N],
and NumPy's broadcasting does the rest. Where the programs part ways (a branch, or a loop bound, that is not the same
for all), their stores are undone and the group is split by that value. A kernel that needs more than that (blocks of
two dimensions, atomics, scans) runs as Triton would run it.
"""

import ast
import functools
import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import interpreter as memory
from triton.language.extra import libdevice
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    ASTTransformer,
    FunctionRewriter,
    GridExecutor,
    InterpreterBuilder,
    ReduceOps,
    ScanOps,
    TensorHandle,
)

GROUP = 128  # programs at once; more gains nothing, and a group's blocks of 8192 pointers should stay in the cache
UNGROUPED = (
    *("create_reshape", "create_trans", "create_expand_dims", "create_cat", "create_join", "create_split"),
    *("create_unsplat", "create_gather", "create_histogram", "create_dot", "create_atomic", "create_descriptor"),
    "create_make_tensor_descriptor",
)  # what these begin the names of is not written for groups

# Not subclasses of Exception: the interpreter wraps those at every call of a device function.


class Parted(BaseException):
    """Raised where Python needs one value (for a branch or a loop bound) and the programs of a group have several."""

    def __init__(self, values):
        self.values = values


class Unsupported(BaseException):
    """Raised by a kernel that cannot run many programs at once."""


class Builder(InterpreterBuilder):
    """The interpreter's operations; on a group of programs while ``grouped`` is set."""

    def __init__(self):
        super().__init__()
        options: Any = self.options  # type: ignore[has-type]
        self.options = replace(options, sanitize_overflow=False)  # as on a device: hashes overflow on purpose
        self.grouped = False
        self.stores = []  # what they overwrote

    def undo(self, mark=0):
        while len(self.stores) > mark:
            memory.store(*self.stores.pop())

    def create_get_program_id(self, axis):
        if not self.grouped:
            return super().create_get_program_id(axis)
        return TensorHandle(self.grid_idx[axis].astype(np.int32)[:, None], tl.int32)

    # A comparison's result keeps the type of its operands in the interpreter, so that a mask may come here as int32,
    # which its memory operations refuse ("mask has unsupported dtype").

    def create_masked_load(self, ptrs, mask, other, *policy):
        dtype = ptrs.get_element_ty()
        np_dtype = interpreter._get_np_dtype(dtype)
        fill = np.zeros(1, np_dtype) if other is None else other.data
        return TensorHandle(memory.load(*np.broadcast_arrays(ptrs.data, mask.data.astype(bool), fill), np_dtype), dtype)

    def create_masked_store(self, ptrs, value, mask, *policy):
        pointers, values, where = np.broadcast_arrays(ptrs.data, value.data, mask.data.astype(bool))
        if self.grouped:
            overwritten = memory.load(pointers, where, np.zeros_like(values), values.dtype)
            self.stores.append((pointers, overwritten, where))
        return memory.store(pointers, values, where)

    def create_splat(self, ret_ty, arg):
        return self.create_broadcast(arg, ret_ty.shape) if self.grouped else super().create_splat(ret_ty, arg)

    def create_broadcast(self, arg, shape):
        if not self.grouped:
            return super().create_broadcast(arg, shape)
        if len(shape) != 1:
            raise Unsupported
        return TensorHandle(np.broadcast_to(arg.data, (*arg.data.shape[:-1], *shape)), arg.dtype.scalar)


def _ungrouped(operation):
    @functools.wraps(operation)
    def guarded(self, *args, **kwargs):
        if self.grouped:
            raise Unsupported
        return operation(self, *args, **kwargs)

    return guarded


for _name, _operation in vars(InterpreterBuilder).items():
    if _name.startswith(UNGROUPED):
        setattr(Builder, _name, _ungrouped(_operation))


class GroupReduce(ReduceOps):
    """Reductions of one-dimensional blocks: [G, N] to [G, 1]."""

    def __init__(self, axis, combine_fn, keep_dims):
        if keep_dims:
            raise Unsupported
        super().__init__(-1, combine_fn, True)

    def check_tensor(self, input):
        if any(len(block.shape) != 1 for block in input):
            raise Unsupported

    def to_tensor(self, ret, dtype):
        return tl.tensor(TensorHandle(ret.astype(interpreter._get_np_dtype(dtype)), dtype.scalar), dtype.scalar)

    def generic_reduce(self, input):
        raise Unsupported


class KernelSource(ASTTransformer):
    """Makes kernels see :func:`_range` as ``range``: the interpreter takes their names from its own globals."""

    def visit_Name(self, node):
        return ast.copy_location(ast.Name("_range", node.ctx), node) if node.id == "range" else node


builder = Builder()
one_by_one = GridExecutor.__call__
ungrouped_kernels = set()


def launch(executor, *args, **kwargs):
    """Launch a kernel on groups of programs, or one by one if it needs an operation that is not written for groups."""
    if executor.fn not in ungrouped_kernels:
        builder.grouped = True
        try:
            return _launch_groups(executor, args, kwargs)
        except Unsupported:
            builder.undo()
            ungrouped_kernels.add(executor.fn)
        finally:
            builder.grouped = False
            builder.stores.clear()
    return one_by_one(executor, *args, **kwargs)


def _launch_groups(executor, args, kwargs):
    fn = executor.fn
    interpreter._patch_lang(fn)
    parameters = inspect.signature(fn).parameters  # of keywords there are more: num_warps
    bound = inspect.getcallargs(fn, *args, **{name: value for name, value in kwargs.items() if name in parameters})
    bound = {n: v if n in executor.constexprs else interpreter._implicit_cvt(v) for n, v in bound.items()}
    grid = executor.grid(bound) if callable(executor.grid) else executor.grid
    builder.set_grid_dim(*(grid := (*grid, 1, 1)[:3]))
    programs = np.indices(grid).reshape(3, -1)
    groups = np.array_split(programs, -(-programs.shape[1] // GROUP), axis=1)
    while groups:
        builder.grid_idx = group = groups.pop()
        mark = len(builder.stores)
        try:
            fn(**bound)
        except Parted as parted:
            builder.undo(mark)
            values = np.broadcast_to(parted.values, (group.shape[1], 1))[:, 0]
            groups += [group[:, values == value] for value in np.unique(values)]


def _agreed(values):
    if (values != values.flat[0]).any():
        raise Parted(values)
    return values.flat[0]


def _truth(tensor):
    if builder.grouped and not tensor.type.is_block():
        return bool(_agreed(tensor.handle.data.astype(bool)))
    return bool(tensor.handle.data) if tensor.handle.data.size == 1 else True


def _index(tensor):
    return int(_agreed(tensor.handle.data))


def _range(*bounds):
    """Count a loop of a group: its programs may start anywhere, as long as they agree on the number of turns."""
    if not builder.grouped or not any(isinstance(bound, tl.tensor) for bound in bounds):
        return range(*bounds)
    start, stop, step = (0, *bounds, 1) if len(bounds) == 1 else (*bounds, 1)[:3]
    first, last = (bound.handle.data if isinstance(bound, tl.tensor) else bound for bound in (start, stop))
    return (start + i * step for i in range(_agreed(np.maximum(0, -((first - last) // step)))))


def _log1p(x):
    return tl.tensor(builder.unary_op(x.handle, np.log1p), x.type)


def _reduce(*args):
    return (GroupReduce if builder.grouped else ReduceOps)(*args)


def _scan(*args):
    if builder.grouped:
        raise Unsupported
    return ScanOps(*args)


class _Kept:
    def restore(self):
        """Leave Triton's language patched: to patch it anew at every call takes half of the time."""


def install():
    """Patch the interpreter of this process for good; a vLLM plugin."""
    interpreter.interpreter_builder = interpreter.interpreter_semantic.builder = builder
    interpreter.ReduceOps, interpreter.ScanOps = _reduce, _scan
    interpreter._range, FunctionRewriter.ast_transformer = _range, KernelSource()
    GridExecutor.__call__ = launch
    libdevice.log1p = _log1p  # the interpreter has no device library; the residual of a probabilistic draft needs this

    patch, patched = interpreter._patch_lang, set()

    def patch_once(fn):
        if fn.__module__ not in patched:
            patched.add(fn.__module__)
            patch(fn)
            tl.tensor.__bool__, tl.tensor.__index__ = _truth, _index
        return _Kept()

    interpreter._patch_lang = patch_once
