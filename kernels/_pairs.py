"""A score and its vocabulary id as one sortable int64, so that a single integer max is the exact reduction.

The high 32 bits order the float32 score, the low 32 bits hold ``2**31 - 1 - id``: the greatest key is the highest score
and, among equal scores, the lowest id. NaN sorts above everything, so that one NaN decides a row.
"""

import triton
import triton.language as tl


@triton.jit
def order_of(values):
    """float32 scores -> int32 in the same order, NaN above everything."""
    bits = tl.where(values == 0, 0.0, values).to(tl.int32, bitcast=True)  # -0.0 ties with 0.0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(values != values, 0x7FFFFFFF, order)


@triton.jit
def key_of(order, ids):
    """What :func:`order_of` made and integer ids in [0, 2**31) -> int64 keys."""
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - ids.to(tl.int64))


@triton.jit
def pack(values, ids):
    """float32 scores and integer ids in [0, 2**31) -> int64 keys."""
    return key_of(order_of(values), ids)


@triton.jit
def id_of(keys):
    """int64 keys -> their int64 ids."""
    return 0x7FFFFFFF - (keys & 0x7FFFFFFF)


@triton.jit
def unpack(keys):
    """int64 keys -> (float32 scores, int64 ids); NaN and -inf come with id 0, as every row without a winner does."""
    order = (keys >> 32).to(tl.int32)
    values = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return values, tl.where(values > float("-inf"), id_of(keys), 0)
