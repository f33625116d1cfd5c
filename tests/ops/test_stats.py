"""Statistics kernels against float64 NumPy, on every backend there is here."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.kernels import stats as kernels
from esper.ops import registry
from esper.ops.stats import ACTIVATIONS, CHUNK_FIELDS, FEATURE_FIELDS, chunk_bounds
from esper.ops.stats.reference import activate

OP = registry.get("channel_stats")
#: Where each backend runs: Triton on the CPU through its interpreter where there is no GPU.
DEVICES = {
    "reference": "cpu",
    "cpu": "cpu",
    "triton": "cpu" if registry.triton_interprets() else "cuda",
    "cuda": "cuda",
}
HERE = [b for b in ("reference", "cpu", "triton") if not OP.reason(registry.Backend(b))]
BACKENDS = [*HERE, pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
E64 = 2.0**-53
E32 = 2.0**-24


@pytest.fixture(autouse=True)
def _fresh_memory_is_full_of_nan():
    """Deterministic mode fills what torch.empty hands out with NaN: an output left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def call(name, backend, *args):
    """Run on the backend's device; results and what was changed in place come back to the CPU."""
    device = DEVICES[backend]
    kernel = registry.get(name).backend(backend)
    if device == "cpu":
        return kernel(*args)
    there = [arg.to(device) if isinstance(arg, torch.Tensor) else arg for arg in args]
    result = kernel(*there)
    if result is None:
        for arg, moved in zip(args, there, strict=True):
            if isinstance(arg, torch.Tensor):
                arg.copy_(moved)
        return None
    return result.cpu() if isinstance(result, torch.Tensor) else tuple(part.cpu() for part in result)


def rows_of(x, channel_dim):
    last = x.detach().movedim(channel_dim, -1)
    return last.reshape(math.prod(last.shape[:-1]), last.shape[-1]).double().numpy()


def oracle(rows, seeds):
    """The same numbers by NumPy in float64, two passes; means and sums in extended precision."""
    n, channels = rows.shape
    finite = np.isfinite(rows)
    values = np.where(finite, rows, 0).astype(np.longdouble)
    count = finite.sum(0)
    mean = values.sum(0) / np.maximum(count, 1)
    delta = np.where(finite, values - mean, 0)
    features = np.zeros((FEATURE_FIELDS, channels))
    features[0], features[1], features[2] = count, mean, (delta**2).sum(0)
    features[3] = np.abs(values).max(0, initial=0)
    features[4] = n - count
    chunks = np.zeros((CHUNK_FIELDS, seeds))
    for s in range(seeds):
        begin, end = chunk_bounds(s, channels, seeds)
        if begin == end or n == 0:
            continue
        sums = values[:, begin:end].sum(1)[finite[:, begin:end].all(1)]
        chunks[0, s] = len(sums)
        chunks[3, s] = n - len(sums)
        if len(sums):
            chunks[1, s] = sums.mean()
            chunks[2, s] = ((sums - sums.mean()) ** 2).sum()
    return features, chunks


def bounds(rows, seeds, backend, dtype):
    """How far a backend may be off, from its arithmetic.

    Deviations from a shift are summed with unit roundoff u, each through at most h additions: (h + 4) u times the
    largest deviation D bounds the error of the mean, and 3 (h + 4) u (D^2 per sample) that of M2 = S - n (mean -
    shift)^2, whose S has one such share and whose subtrahend two. D is at most twice the largest deviation from the
    mean, because the shift is itself a sample or a mean of some, which fewer than 16 roundings moved. Records are
    joined in float64: at most n / 16 joins, each of which rounds a mean of magnitude |mean| + D a few times.
    """
    single = backend in ("triton", "cuda") and dtype is not torch.float64
    u = E32 if single else E64
    h = {"triton": kernels.DEPTH, "cuda": 64}.get(backend, 256)
    n, channels = rows.shape
    finite = np.isfinite(rows)
    values = np.where(finite, rows, 0)
    mean = values.sum(0) / np.maximum(finite.sum(0), 1)
    deviation = 2 * np.abs(np.where(finite, values - mean, 0)).max(0, initial=0)
    joins = (n / 16 + 8) * E64
    deviation = deviation + (16 * u * (np.abs(mean) + deviation) if single else 0)
    mean_bound = (h + 4) * u * deviation + joins * (np.abs(mean) + deviation)
    m2_bound = n * (3 * (h + 4) * u * deviation**2 + joins * deviation * (np.abs(mean) + deviation))
    row_mean, row_m2 = np.zeros(seeds), np.zeros(seeds)
    for s in range(seeds):
        begin, end = chunk_bounds(s, channels, seeds)
        width = end - begin
        row_deviation = deviation[begin:end].sum()
        level = np.abs(mean[begin:end]).sum()
        error = (h + width + 4) * u * row_deviation + (joins + width * E64) * (level + row_deviation)
        row_mean[s] = error
        row_m2[s] = n * 2 * error * (row_deviation + error)
    return mean_bound, m2_bound, row_mean, row_m2


def assert_stats(features, chunks, rows, seeds, backend, dtype):
    want_features, want_chunks = oracle(rows, seeds)
    mean_bound, m2_bound, row_mean_bound, row_m2_bound = bounds(rows, seeds, backend, dtype)
    got_features, got_chunks = features.numpy(), chunks.numpy()
    assert features.dtype is torch.float64 and chunks.dtype is torch.float64
    for field in (0, 3, 4):
        np.testing.assert_array_equal(got_features[field], want_features[field])
    for field in (0, 3):
        np.testing.assert_array_equal(got_chunks[field], want_chunks[field])
    tiny = np.finfo(np.float64).tiny
    assert (np.abs(got_features[1] - want_features[1]) <= mean_bound + tiny).all()
    assert (np.abs(got_features[2] - want_features[2]) <= m2_bound + tiny).all()
    assert (np.abs(got_chunks[1] - want_chunks[1]) <= row_mean_bound + tiny).all()
    assert (np.abs(got_chunks[2] - want_chunks[2]) <= row_m2_bound + tiny).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "seeds", "channel_dim"),
    [
        ((1, 1), 1, -1),
        ((5,), 2, -1),
        ((7, 13), 4, -1),  # S does not divide C
        ((70, 3), 5, -1),  # more seeds than features: empty chunks
        ((2, 33, 9), 2, -1),
        ((3, 6, 5, 7), 4, 1),
        ((2, 5, 11), 2, 1),
        ((9, 4), 4, 1),
        ((0, 4), 2, -1),
        ((4, 0), 2, -1),
        ((2, 3, 0, 4), 2, 1),
    ],
)
def test_shapes_and_dtypes(backend, dtype, shape, seeds, channel_dim):
    x = torch.randn(shape).to(dtype)
    features, chunks = call("channel_stats", backend, x, seeds, channel_dim)
    assert_stats(features, chunks, rows_of(x, channel_dim), seeds, backend, dtype)


def test_every_backend_is_tested_here():
    assert HERE == ["reference", "cpu", "triton"], [OP.reason(b) for b in registry.Backend]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("make", "channel_dim"),
    [
        (lambda: torch.randn(6, 20)[:, 3:15:2], -1),
        (lambda: torch.randn(20, 9).t(), -1),
        (lambda: torch.randn(12, 10)[::3], -1),
        (lambda: torch.randn(4, 6, 10)[:, ::2], -1),
        (lambda: torch.randn(2, 3, 4, 5)[:, ::2, ::2, ::2].transpose(0, 1), -1),
        (lambda: torch.randn(1, 7).expand(5, 7), -1),
        (lambda: torch.randn(2, 6, 4, 5).to(memory_format=torch.channels_last), 1),
        (lambda: torch.randn(2, 6, 8, 8)[:, :, ::2, 1:6], 1),
        (lambda: torch.randn(2, 6, 8, 8)[:, 1:4], 1),
        (lambda: torch.randn(4, 2, 3, 3).transpose(0, 1), 1),
    ],
)
def test_any_strides(backend, make, channel_dim):
    x = make()
    features, chunks = call("channel_stats", backend, x, 3, channel_dim)
    assert_stats(features, chunks, rows_of(x, channel_dim), 3, backend, x.dtype)
    y, features, chunks = call("act_stats", backend, x, "relu", 3, channel_dim)
    assert torch.equal(y, x.relu())
    assert_stats(features, chunks, rows_of(y, channel_dim), 3, backend, x.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("shape", "channel_dim"), [((300, 11), -1), ((2, 11, 15, 10), 1)])
def test_mean_far_above_the_spread(backend, dtype, shape, channel_dim):
    # The bound knows the spread, not the mean: computing E[x^2] - E[x]^2 would miss it by 1e8.
    x = (torch.randn(shape, dtype=torch.float64) + 1e4).to(dtype)
    features, chunks = call("channel_stats", backend, x, 3, channel_dim)
    assert_stats(features, chunks, rows_of(x, channel_dim), 3, backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "channel_dim"), [((75, 10), -1), ((3, 10, 5, 5), 1)])
def test_non_finite_values_are_counted_not_spread(backend, dtype, shape, channel_dim):
    x = torch.randn(shape).to(dtype)
    flat = x.movedim(channel_dim, -1)
    index = torch.randint(0, 75, (12, 2)) % torch.tensor([75, 10])
    positions = flat.reshape(75, 10).clone()
    for k, (row, feature) in enumerate(index.tolist()):
        positions[row, feature] = (math.nan, math.inf, -math.inf)[k % 3]
    positions[:, 7] = math.nan  # a feature that has no finite value at all
    positions[0, 0] = math.nan  # the row a shift would be taken from
    x = positions.reshape(flat.shape).movedim(-1, channel_dim).contiguous()
    features, chunks = call("channel_stats", backend, x, 3, channel_dim)
    assert_stats(features, chunks, rows_of(x, channel_dim), 3, backend, dtype)
    assert features[0, 7] == 0 and features[4, 7] == 75 and chunks[0, 2] == 0


@pytest.mark.parametrize("backend", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_ten_million_samples(backend):
    x = torch.randn(10_000_000, 1) + 1e4
    features, chunks = call("channel_stats", backend, x, 1, -1)
    assert_stats(features, chunks, rows_of(x, -1), 1, backend, torch.float32)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_largest_finite_values_do_not_overflow(backend):
    x = torch.tensor([[3e38, 1.0], [-3e38, 2.0], [1e38, math.inf]])
    features, chunks = call("channel_stats", backend, x, 1, -1)
    assert_stats(features, chunks, rows_of(x, -1), 1, backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_are_the_same_every_time(backend):
    x = torch.randn(150, 6)
    first = call("channel_stats", backend, x, 4, -1)
    again = call("channel_stats", backend, x.clone(), 4, -1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's NumPy: 1 / (1 + inf) is meant
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_agrees_with_torch(backend, dtype, activation):
    x = torch.cat((torch.linspace(-12, 12, 101, dtype=torch.float64), torch.tensor([0.0, -0.0, 1e-6, -1e-4, 3e-3])))
    x = torch.cat((x, x[:20])).reshape(21, 6).to(dtype)
    y, features, chunks = call("act_stats", backend, x, activation, 4, -1)
    exact = activate(x.double(), activation)
    # Half an ulp of the result's dtype for the rounding. Before it: the CPU works in float64 (erfc and exp to 3e-11);
    # torch and Triton in float32, where exp(t) is off by (2 + |t|) ulps with |t| <= 150 here, and gelu's 1 + erf by an
    # ulp of 2 times x.
    finfo = torch.finfo(dtype)
    inner = {"cpu": 3e-11}.get(backend, 2.0**-23) if dtype is not torch.float64 else 2.0**-52
    spread = 1.0 if backend == "cpu" and dtype is not torch.float64 else 8.0
    # Triton's interpreter cuts bfloat16 off instead of rounding it: a whole ulp.
    cuts = backend == "triton" and registry.triton_interprets() and dtype is torch.bfloat16
    rounding = finfo.eps if cuts else finfo.eps / 2
    bound = rounding * exact.abs() + spread * inner * (exact.abs() * 20 + x.double().abs()) + finfo.smallest_normal
    assert y.dtype is dtype and y.shape == x.shape
    assert ((y.double() - exact).abs() <= bound).all()
    assert_stats(features, chunks, rows_of(y, -1), 4, backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_spreads_nan_to_itself_only(backend, activation):
    x = torch.randn(5, 6)
    x[1, 2] = math.nan
    y, features, _ = call("act_stats", backend, x, activation, 2, -1)
    assert y.isnan().nonzero().tolist() == [[1, 2]]
    assert features[4].tolist() == [0, 0, 1, 0, 0, 0]


def test_half_rounds_as_torch_does():
    # Every half: relu copies the positive ones through float64 and back, so each must come back bit for bit.
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(0, 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(-1, 64)
        y, features, _ = call("act_stats", "cpu", x, "relu", 1, -1)
        same = (y.view(torch.int16) == x.view(torch.int16)) | (y.isnan() & x.isnan())
        assert same.all()
        assert features[0].sum() == x.isfinite().sum()
        # And sigmoid's float64 result is rounded to nearest, by way of float32 as torch does.
        z = (torch.randn(4096, dtype=torch.float64) * 8).to(dtype).reshape(64, 64)
        y, _, _ = call("act_stats", "cpu", z, "sigmoid", 1, -1)
        assert torch.equal(y, torch.sigmoid(z.double()).float().to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_merging_windows_equals_one_window(backend):
    x = torch.randn(130, 7) + 3
    x[4, 1] = math.inf
    features, chunks = (
        torch.zeros(FEATURE_FIELDS, 7, dtype=torch.float64),
        torch.zeros(CHUNK_FIELDS, 3, dtype=torch.float64),
    )
    for part in x.split((1, 60, 69)):
        call("stats_merge", backend, features, chunks, *call("channel_stats", backend, part, 3, -1))
    assert_stats(features, chunks, rows_of(x, -1), 3, backend, torch.float32)
    before = features.clone(), chunks.clone()
    call("stats_merge", backend, features, chunks, torch.zeros_like(features), torch.zeros_like(chunks))
    assert torch.equal(features, before[0]) and torch.equal(chunks, before[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "channel_dim"), [((64, 6), -1), ((3, 6), -1), ((4, 16, 6), -1), ((16, 6, 4, 4), 1), ((1, 6, 8, 8), 1)]
)
def test_observe_reads_spread_rows_and_accumulates(backend, shape, channel_dim):
    x = torch.randn(shape)
    features, chunks = (
        torch.zeros(FEATURE_FIELDS, 6, dtype=torch.float64),
        torch.zeros(CHUNK_FIELDS, 4, dtype=torch.float64),
    )
    all_rows = {tuple(row) for row in rows_of(x, channel_dim)}
    expected = min(8, len(all_rows))
    call("observe", backend, x, 4, channel_dim, 8, 0, features, chunks)
    assert features[0].tolist() == [expected] * 6
    call("observe", backend, x, 4, channel_dim, 8, 1, features, chunks)
    assert features[0].tolist() == [2 * expected] * 6
    assert chunks[0].tolist() == [2 * expected] * 4  # every chunk of 6 features for 4 seeds has one or two
    # All backends read the same rows.
    theirs = torch.zeros_like(features), torch.zeros_like(chunks)
    for phase in (0, 1):
        call("observe", "reference", x, 4, channel_dim, 8, phase, *theirs)
    torch.testing.assert_close(features, theirs[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(chunks, theirs[1], rtol=1e-5, atol=1e-6)


def test_phases_cover_every_row():
    x = torch.arange(40.0).reshape(40, 1)
    seen = torch.zeros(FEATURE_FIELDS, 1, dtype=torch.float64), torch.zeros(CHUNK_FIELDS, 1, dtype=torch.float64)
    for phase in range(5):
        registry.get("observe")(x, 1, -1, 8, phase, *seen)
    assert seen[0][0].item() == 40
    assert seen[0][1].item() == pytest.approx(19.5, abs=1e-12)


def expected_health(x, seeds, eps):
    """From the values themselves, feature by feature: nothing of the kernels' way."""
    rows = x.double().numpy()
    out = np.zeros((7, seeds))
    for s in range(seeds):
        begin, end = chunk_bounds(s, rows.shape[1], seeds)
        part = rows[:, begin:end]
        finite = np.isfinite(part)
        good = part[finite]
        out[0, s], out[5, s] = good.size, part.size - good.size
        out[6, s] = np.nan
        if not good.size:
            continue
        out[1, s], out[2, s] = good.mean(), good.var()
        columns = [part[finite[:, i], i] for i in range(end - begin)]
        out[3, s] = np.mean([np.abs(c).max() <= eps for c in columns])
        whole = part[finite.all(1)]
        separate = sum(c.var() for c in columns)
        if end - begin > 1 and separate > 0:
            raw = (whole.sum(1).var() - separate) / ((end - begin - 1) * separate)
            out[4, s] = np.clip(raw, -1 / (end - begin - 1), 1)
        within = sum(c.var() * c.size for c in columns) / good.size
        moving = within / (within + 1e-4 * (out[2, s] + out[1, s] ** 2)) if within > 0 else 0
        out[6, s] = (1 - out[3, s]) * (1 - max(0, out[4, s])) * moving if not out[5, s] else 0
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seeds", [1, 3, 4, 12])
@pytest.mark.parametrize("kind", ["noise", "copies", "opposed", "dead", "constant", "nan"])
def test_health(backend, seeds, kind):
    x = torch.randn(40, 9)
    match kind:
        case "copies":
            x = x[:, :1].expand(40, 9).contiguous()
        case "opposed":
            x = torch.cat((x[:, :4], -x[:, :4], x[:, :1]), 1)
        case "dead":
            x[:, ::2] = 0
        case "constant":
            x = torch.full((40, 9), 3.0)
        case "nan":
            x[3, 5] = math.nan
    features, chunks = call("channel_stats", "reference", x, seeds, -1)
    got = call("seed_health", backend, features, chunks, 0.0).numpy()
    # Everything is float64 over 40 x 9 values: a few hundred roundings, times the cancellation in Var(sum) - sum Var.
    np.testing.assert_allclose(got, expected_health(x, seeds, 0.0), rtol=1e-11, atol=1e-11)
    assert ((got[6] >= 0) & (got[6] <= 1) | np.isnan(got[6])).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_health_of_nothing_is_no_opinion(backend):
    got = call(
        "seed_health", backend, torch.zeros(5, 4, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64), 0.0
    )
    assert got[:6].eq(0).all() and got[6].isnan().all()


@given(data=st.data())
def test_backends_agree_on_any_small_input(data):
    rows, channels, seeds = (data.draw(st.integers(1, top)) for top in (12, 9, 11))
    values = data.draw(
        st.lists(
            st.floats(-(2.0**50), 2.0**50, width=32) | st.sampled_from([math.nan, math.inf, -math.inf]),
            min_size=rows * channels,
            max_size=rows * channels,
        )
    )
    x = torch.tensor(values).reshape(rows, channels)
    for backend in ("reference", "cpu"):  # the interpreter takes milliseconds a seed
        features, chunks = call("channel_stats", backend, x, seeds, -1)
        assert_stats(features, chunks, rows_of(x, -1), seeds, backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_arguments_say_what_was_wrong(backend):
    x = torch.randn(4, 6)
    with pytest.raises(TypeError, match="int64"):
        call("channel_stats", backend, x.long(), 2, -1)
    with pytest.raises(ValueError, match="channel_dim 0"):
        call("channel_stats", backend, x, 2, 0)
    with pytest.raises(ValueError, match="seeds is 0"):
        call("channel_stats", backend, x, 0, -1)
    with pytest.raises(ValueError, match="'swish'"):
        call("act_stats", backend, x, "swish", 2, -1)
    features, chunks = call("channel_stats", backend, x, 2, -1)
    with pytest.raises(ValueError, match=r"need contiguous float64 \[5, 6\]"):
        call("observe", backend, x, 2, -1, 8, 0, features[:, :5], chunks)
    with pytest.raises(ValueError, match=r"and \[4, 3\]"):
        call("observe", backend, x, 3, -1, 8, 0, features, chunks)
    with pytest.raises(ValueError, match="float32"):
        call("observe", backend, x, 2, -1, 8, 0, features.float(), chunks)


OPCHECK = {
    "channel_stats": lambda f, c: (torch.randn(4, 6), 2, -1),
    "act_stats": lambda f, c: (torch.randn(4, 6), "gelu", 2, -1),
    "observe": lambda f, c: (torch.randn(4, 6), 2, -1, 8, 0, f, c),
    "stats_merge": lambda f, c: (f, c, f.clone(), c.clone()),
    "seed_health": lambda f, c: (f, c, 1e-6),
}


@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck(name):
    features, chunks = registry.get("channel_stats")(torch.randn(9, 6), 2, -1)
    torch.library.opcheck(registry.get(name).overload, OPCHECK[name](features, chunks))
