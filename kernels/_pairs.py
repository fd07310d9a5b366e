"""Keys that hold a score and its vocabulary id in one int64, so that an integer maximum is the exact reduction.

The high 32 bits sort like the float32 score, and the low 32 bits hold ``2**31 - 1 - id``. So the greatest key has the
highest score and, among equal scores, the lowest id. NaN is above every other score, so the maximum of a row with any
NaN is NaN.
"""

import triton
import triton.language as tl


@triton.jit
def order_of(values):
    """Return int32 numbers in the same order as float32 scores, with NaN above all others."""
    bits = tl.where(values == 0, 0.0, values).to(tl.int32, bitcast=True)  # -0.0 ties with 0.0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(values != values, 0x7FFFFFFF, order)


@triton.jit
def key_of(order, ids):
    """Return the int64 keys of numbers from :func:`order_of` and integer ids in [0, 2**31)."""
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - ids.to(tl.int64))


@triton.jit
def pack(values, ids):
    """Return the int64 keys of float32 scores and integer ids in [0, 2**31)."""
    return key_of(order_of(values), ids)


@triton.jit
def id_of(keys):
    """Return the int64 ids in int64 keys."""
    return 0x7FFFFFFF - (keys & 0x7FFFFFFF)


@triton.jit
def unpack(keys):
    """Return the float32 scores and the int64 ids in int64 keys. The id is 0 for NaN and -inf."""
    order = (keys >> 32).to(tl.int32)
    values = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return values, tl.where(values > float("-inf"), id_of(keys), 0)
