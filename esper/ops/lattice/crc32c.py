"""Arithmetic behind the checksum: polynomials over GF(2) modulo the Castagnoli polynomial, bit-reflected.

Conventions of CRC-32C as in RFC 3720, appendix B.4: initial value and final inversion 0xFFFFFFFF, least significant bit
first. A 32-bit number stands for a polynomial whose coefficient of x^0 is bit 31. The raw remainder of a message of n
little-endian words w_0 .. w_(n-1) is ``xor_i w_i * x^(32 (n - i)) mod P``: a sum that any number of threads may compute
in any order.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from torch import Tensor

__all__ = ["POLYNOMIAL", "finish", "multiply", "power", "xor_all"]

POLYNOMIAL = 0x82F63B78
_ONE = 0x80000000
_ONES = 0xFFFFFFFF


def multiply(a: int, b: int) -> int:
    """The product of two polynomials mod P."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (POLYNOMIAL if b & 1 else 0)
    return product


@lru_cache(maxsize=1024)
def power(n: int) -> int:
    """x^n mod P for n >= 0."""
    result, square = _ONE, _ONE >> 1
    while n:
        if n & 1:
            result = multiply(result, square)
        square = multiply(square, square)
        n >>= 1
    return result


def finish(raw: int, size: int) -> int:
    """The checksum of a message of ``size`` bytes whose raw remainder is ``raw``."""
    return raw ^ multiply(_ONES, power(8 * size)) ^ _ONES


def xor_all(partials: Tensor) -> int:
    """Exclusive or of an int32 tensor, as an unsigned number; copies it to the host."""
    return int(np.bitwise_xor.reduce(partials.cpu().numpy().view(np.uint32), initial=np.uint32(0)))
