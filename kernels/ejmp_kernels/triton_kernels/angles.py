"""Device functions shared by the ops with angles: spherical functions, cosines, images.

A tile of scores has rows r = (e, l): edge e and degree l, so that seven sums over neighbours are one matrix product.
"""

import triton
import triton.language as tl


@triton.jit
def legendre(x, degree, S: tl.constexpr, ORDER: tl.constexpr):
    """Return the ORDER-th derivative (0, 1, 2) of Y_l0(x) = sqrt((2l+1)/4pi) P_l(x), for l = degree < S, or else zero.

    By l P_l = (2l-1) x P_{l-1} - (l-1) P_{l-2} and P'_l = P'_{l-2} + (2l-1) P_{l-1}; degree broadcasts against x.
    """
    zero = x * 0
    before, p, before1, p1, before2, p2 = zero, zero + 1, zero, zero, zero, zero
    out = tl.where(degree == 0, 0.28209479177387814 * (p if ORDER == 0 else zero), 0.0)
    for l in tl.static_range(1, S):
        if ORDER == 2:
            before2, p2 = p2, before2 + (2 * l - 1) * p1
        if ORDER >= 1:
            before1, p1 = p1, before1 + (2 * l - 1) * p
        before, p = p, ((2 * l - 1) * x * p - (l - 1) * before) / l
        norm: tl.constexpr = ((2 * l + 1) / (4 * 3.141592653589793)) ** 0.5
        if ORDER == 0:
            out = tl.where(degree == l, norm * p, out)
        elif ORDER == 1:
            out = tl.where(degree == l, norm * p1, out)
        else:
            out = tl.where(degree == l, norm * p2, out)
    return out
