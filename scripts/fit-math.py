#!/usr/bin/env python3
"""Fits the polynomials of crates/kernels/src/simd/math.rs: near-minimax by least squares on Chebyshev nodes, with the
coefficients rounded to float32 one after the other (the lowest power first) and the rest fitted again each time.

Prints each table, lowest power first, with its largest error over the range. Needs numpy."""

import math
from fractions import Fraction

import numpy as np


def fit(name, value, weight, low, high, degree, power=lambda x: x):
    """value(x) ~ sum c[k] power(x)^k on [low, high], errors counted as weight(x) * difference."""
    k = np.arange(4000)
    x = (low + high) / 2 + (high - low) / 2 * np.cos(np.pi * (k + 0.5) / len(k))
    y = np.array([value(v) for v in x])
    w = np.array([weight(v) for v in x])
    basis = np.array([power(x) ** d for d in range(degree + 1)]).T
    fixed = []
    rest = y.copy()
    for d in range(degree + 1):
        c = np.linalg.lstsq(basis[:, d:] * w[:, None], rest * w, rcond=None)[0]
        fixed.append(np.float32(c[0]))
        rest = rest - float(fixed[-1]) * basis[:, d]
    error = np.max(np.abs(rest * w))
    print(f"{name}: {error:.1e}")
    print("   ", ", ".join(repr(float(c)) for c in fixed))



def exp_rest(r):  # (e^r - 1 - r) / r^2
    return math.fsum(r**k / math.factorial(k + 2) for k in range(20))


def log_rest(f):  # (ln(1 + f) - f + f^2 / 2) / f^3
    return math.fsum((-f) ** k / (k + 3) for k in range(200)) if abs(f) < 0.5 else None


def tanh_rest(x):  # (tanh x - x) / x^3
    if x < 0.05:
        return -1 / 3 + 2 * x**2 / 15 - 17 * x**4 / 315 + 62 * x**6 / 2835
    return (math.tanh(x) - x) / x**3


def erf_rest(x):  # (erf x - x) / x; erf x / x itself would lose half an ulp in its first coefficient
    return (math.erf(x) / x if x > 1e-8 else 2 / math.sqrt(math.pi)) - 1


def sin_rest(x):  # (sin x - x) / x^3
    return math.fsum((-1) ** (k + 1) * x ** (2 * k) / math.factorial(2 * k + 3) for k in range(12))


def cos_rest(x):  # (cos x - 1 + x^2 / 2) / x^4
    return math.fsum((-1) ** k * x ** (2 * k) / math.factorial(2 * k + 4) for k in range(12))


square = lambda x: x * x
half_ln2 = math.log(2) / 2
fit("EXP: (e^r - 1 - r) / r^2, |r| <= ln(2)/2", exp_rest, lambda r: r * r, -half_ln2, half_ln2, 4)
fit(
    "LOG: (ln(1+f) - f + f^2/2) / f^3, sqrt(1/2) <= 1+f <= sqrt(2)",
    log_rest,
    lambda f: f * f,
    math.sqrt(0.5) - 1,
    math.sqrt(2) - 1,
    8,
)
fit("TANH: (tanh x - x) / x^3 in x^2, |x| <= 0.625", tanh_rest, square, 0, 0.625, 4, square)
fit("ERF: (erf x - x) / x in x^2, |x| <= 0.95", erf_rest, lambda x: 1, 0, 0.95, 6, square)
fit(
    "ERFC: -ln(erfc x), 0.9 <= x <= 4",
    lambda x: -math.log(math.erfc(x)),
    lambda x: math.erfc(x),
    0.9,
    4,
    8,
)
fit("SIN: (sin x - x) / x^3 in x^2, |x| <= pi/4", sin_rest, square, 0, math.pi / 4, 3, square)
fit("COS: (cos x - 1 + x^2/2) / x^4 in x^2, |x| <= pi/4", cos_rest, lambda x: x**4, 0, math.pi / 4, 3, square)

ln2 = math.log(2)
ln2_hi = float(np.float32(round(ln2 * 2**15) / 2**15))  # 9 low bits are 0: n * ln2_hi is exact
print("LN2_HI, LN2_LO:", ln2_hi, repr(float(np.float32(ln2 - ln2_hi))))
rest = Fraction("1.57079632679489661923132169163975144209858469968755291")
parts = []
for _ in range(3):
    parts.append(float(np.float32(float(rest))))
    rest -= Fraction(parts[-1])
print("HALF_PI:", *map(repr, parts))
