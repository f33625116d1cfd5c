"""The bank's products as every instruction set of this processor has them, against NumPy in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from esper.ops import native

module: Any = native.load()
if module is None or not hasattr(module, "graft_instruction_sets"):
    pytest.skip("esper._native is not built, or older than this checkout", allow_module_level=True)

COMPILED = ("baseline", "avx2", "avx512")
SEEDS = 3
#: rows, d_in, d_out, ranks: nothing fits a tile, everything fits, less than one register, one row, no row, several
#: blocks of rows; long rows, whole tiles of them and some that are left over.
SIZES = [
    (7, 37, 53, (5, 3, 6)),
    (24, 64, 96, (8, 8, 8)),
    (2, 3, 5, (1, 1, 1)),
    (1, 129, 31, (4, 9, 2)),
    (5, 16, 3, (16, 1, 16)),
    (0, 8, 8, (2, 2, 2)),
    (1001, 70, 9, (3, 1, 4)),
    (64, 1024, 528, (16, 8, 8)),
    (45, 512, 1040, (16, 24, 40)),
    (33, 1000, 512, (8, 4, 4)),
]


@pytest.fixture(params=COMPILED)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    available = module.graft_instruction_sets()
    if request.param not in available:
        pytest.skip(f"this processor has {', '.join(available)}, not {request.param}")
    module.graft_use_instruction_set(request.param)
    yield request.param
    module.graft_use_instruction_set(available[-1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("chunked", [False, True])
def test_products(instruction_set: str, dtype: Any, size: tuple[int, int, int, tuple[int, ...]], chunked: bool) -> None:
    n, d_in, d_out, ranks = size
    rng = np.random.default_rng(n + d_in)
    rows = sum(ranks)
    first = np.concatenate([[0], np.cumsum(ranks)]).tolist()
    spans = [(s * d_out // SEEDS, (s + 1) * d_out // SEEDS) if chunked else (0, d_out) for s in range(SEEDS)]
    table = [(s, first[s], first[s + 1], *spans[s], False, 0) for s in range(SEEDS)]
    x, h, gy, down, up = (
        rng.standard_normal(shape).astype(dtype)
        for shape in ((n, d_in), (n, d_out), (n, d_out), (rows, d_in), (rows, d_out))
    )
    alpha = np.array([0.25, 0.5, 0.75], dtype=np.float32)
    bank = getattr(module, "GraftBankF32" if dtype is np.float32 else "GraftBankF64")(table, d_in, d_out, rows, False)
    weights = np.concatenate([down.ravel(), up.ravel()])
    y, gx, gweights = (np.full_like(t, np.nan) for t in (h, x, weights))
    gdown, gup = gweights[: down.size].reshape(down.shape), gweights[down.size :].reshape(up.shape)
    coefficients = bank.forward(weights.ctypes.data, x.ctypes.data, h.ctypes.data, y.ctypes.data, n, alpha.ctypes.data)
    assert coefficients is not None
    bank.backward(
        weights.ctypes.data, coefficients, x.ctypes.data, gy.ctypes.data, n, gx.ctypes.data, 0, gweights.ctypes.data
    )

    # In float64, the coefficients and chunks folded into up. The same with absolute values bounds the errors:
    # a sum of k products is off by k roundings of the sum of their absolute values at most (Higham 2002, section 3.1).
    c = np.zeros((rows, d_out))
    for s, (begin, end) in enumerate(spans):
        c[first[s] : first[s + 1], begin:end] = alpha[s]
    unit = np.finfo(dtype).eps / 2
    for got, formula, depth in (
        (y, lambda x, h, gy, down, up: h + x @ down.T @ (c * up), d_in + rows + 4),
        (gx, lambda x, h, gy, down, up: gy @ (c * up).T @ down, d_out + rows + 4),
        (gdown, lambda x, h, gy, down, up: (gy @ (c * up).T).T @ x, d_out + n + 4),
        (gup, lambda x, h, gy, down, up: c * ((x @ down.T).T @ gy), d_in + n + 4),
    ):
        exact = [t.astype(np.float64) for t in (x, h, gy, down, up)]
        error = np.abs(got - formula(*exact))
        assert (error <= depth * unit * formula(*map(np.abs, exact))).all(), error.max(initial=0.0)


def test_what_is_not_finite_is_noticed_wherever_it_is(instruction_set: str) -> None:
    n, d = 5, 41
    bank = module.GraftBankF32([(0, 0, 1, 0, d, False, 0)], d, d, 1, False)
    weights = np.concatenate([np.ones(d, np.float32), np.zeros(d, np.float32)])  # down, up
    x, y = np.zeros((n, d), np.float32), np.empty((n, d), np.float32)
    alpha = np.ones(1, np.float32)
    for position in range(n * d):
        for bad in (np.nan, np.inf, -np.inf):
            h = np.zeros((n, d), np.float32)
            h.flat[position] = bad
            assert (
                bank.forward(weights.ctypes.data, x.ctypes.data, h.ctypes.data, y.ctypes.data, n, alpha.ctypes.data)
                is None
            )
    assert (
        bank.forward(weights.ctypes.data, x.ctypes.data, x.ctypes.data, y.ctypes.data, n, alpha.ctypes.data) is not None
    )


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="no instruction set named mmx"):
        module.graft_use_instruction_set("mmx")
