"""What the ahead-of-time compiler is told of the graft kernels is what their launchers ask for."""

from __future__ import annotations

import itertools

import pytest
import torch

from esper.blueprints.families import FamilyName
from esper.blueprints.nodes import ACTIVATIONS, NORMS
from esper.ops import registry, tuning
from esper.ops.binaries import package_kernels, tile_sizes
from esper.ops.graft import (
    blend_bank,
    blend_elementwise,
    graft_bank,
    graft_bank_backward,
    graft_blend,
    graft_blend_backward,
    graft_elementwise,
    graft_elementwise_backward,
    triton_blend,
    triton_elementwise,
)
from esper.ops.graft import triton as launcher
from esper.ops.graft.variants import ACTIVATION_CODES, BANK_FAMILIES, KernelVariant, shipped, variants
from esper.ops.toolchain import Request, kernels_for

DEVICE = "cpu" if registry.triton_interprets() else "cuda"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def test_every_activation_has_a_number():
    assert set(ACTIVATION_CODES) == {None, *ACTIVATIONS}
    assert sorted(ACTIVATION_CODES.values()) == list(range(len(ACTIVATIONS) + 1))


@pytest.mark.parametrize("family", FamilyName)
@pytest.mark.parametrize("norm", [None, *NORMS])
@pytest.mark.parametrize("rank", [1, 16, 64, 256])
def test_entries_fit_their_kernels(family, norm, rank):
    known = package_kernels()
    for dtype in DTYPES:
        found = variants(family, "gelu", norm, dtype, rank=rank)
        names = [(v.direction, v.kernel.__name__) for v in found]
        assert len(set(names)) == len(names) and {d for d, _ in names} == {"forward", "backward"}
        for v in found:
            arguments = v.kernel.arg_names
            assert [*v.signature] == [a for a in arguments if a in v.signature]
            assert {*v.signature, *v.constants} == {*arguments} and not {*v.signature} & {*v.constants}
            # A binary whose signature the package does not know is not loaded.
            assert tuple(v.signature.items()) in known[v.kernel.__name__].signatures
        kinds = dict.fromkeys(BANK_FAMILIES, "graft_bank_kernel") | {"elementwise": "graft_elementwise_kernel"}
        assert names[0][1] == kinds.get(family, "graft_blend_kernel")


def identity(variant: KernelVariant) -> tuple[object, ...]:
    parts = (variant.signature, variant.constants, variant.options)
    return variant.kernel.__name__, *(tuple(part.items()) for part in parts)


@pytest.mark.parametrize("family", FamilyName)
@pytest.mark.parametrize("rank", [1, 17, 65, 300])
def test_what_the_forge_ships_is_known(family, rank):
    known = [identity(variant) for variant in shipped()]
    assert len(set(known)) == len(known)
    fixed = {"lowrank": [None], "gated": list(ACTIVATIONS)}
    for activation in fixed.get(family, ACTIVATION_CODES):
        for dtype, aligned, biased, replaces in itertools.product(DTYPES, *[(False, True)] * 3):
            flags = {"aligned": aligned, "biased": biased, "replaces": replaces}
            found = variants(family, activation, "layernorm", dtype, rank=rank, **flags)
            assert {identity(variant) for variant in found} <= set(known)


def test_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match="swish"):
        variants("bottleneck", "swish", None, "bf16")
    with pytest.raises(ValueError, match="fp64"):
        variants("bottleneck", "gelu", None, "fp64")


@pytest.fixture
def asked(monkeypatch):
    """The kernels that the launchers choose, with their constants."""
    calls = []
    choose = launcher.choose

    def spy(kernel, dtype, device, constants, options, **tuned):
        calls.append((kernel.__name__, {**constants, "EMULATE": False} if "EMULATE" in constants else constants))
        return choose(kernel, dtype, device, constants, options, **tuned)

    monkeypatch.setattr(launcher, "choose", spy)
    monkeypatch.setattr(triton_blend, "choose", spy)
    monkeypatch.setattr(triton_elementwise, "choose", spy)
    return calls


def fixed(constants):
    return {name: value for name, value in constants.items() if name not in tile_sizes(constants)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["lowrank", "bottleneck", "gated"])
def test_a_bank_asks_for_these(asked, dtype, family):
    activation = None if family == "lowrank" else "silu"
    gated, biased = family == "gated", family != "lowrank"
    like = {"dtype": DTYPES[dtype], "device": DEVICE}
    x, h = torch.ones(2, 16, **like), torch.ones(2, 16, **like)
    down, up, bias = torch.ones(3, 16, **like), torch.ones(3, 16, **like), torch.ones(3, **like)
    value, value_bias = (down, bias) if gated and biased else (None, None)
    alpha = torch.full((1,), 0.5, device=DEVICE)
    rest = down, value, up, bias if biased else None, value_bias, [0, 0, 16, 0, 0, 3], activation
    _, faults = graft_bank.backend("triton")(x, h, alpha, *rest)
    graft_bank_backward.backend("triton")(h, x, alpha, faults, *rest, True, True, True)
    expected = variants(family, activation, None, dtype, rank=3, biased=biased, replaces=True)
    assert [(name, fixed(c)) for name, c in asked] == [(v.kernel.__name__, fixed(v.constants)) for v in expected]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_blend_asks_for_these(asked, dtype):
    h = torch.ones(2, 3, dtype=DTYPES[dtype], device=DEVICE)
    alpha, mask = torch.ones(1, device=DEVICE), torch.ones(2, 1, dtype=torch.bool, device=DEVICE)
    _, faults = graft_blend.backend("triton")(h, [h], [mask], alpha, [0, 0, 3, 0], 1)
    graft_blend_backward.backend("triton")(h, alpha, faults, [0, 0, 3, 0], 1)
    expected = variants("dense", None, None, dtype)
    assert [(name, fixed(c)) for name, c in asked] == [(v.kernel.__name__, fixed(v.constants)) for v in expected]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise_seeds_ask_for_these(asked, dtype, shifted):
    h = torch.ones(2, 3, dtype=DTYPES[dtype], device=DEVICE)
    alpha = torch.ones(1, device=DEVICE)
    rest = h[:1], h[:1] if shifted else None, [0, 0, 3, 0], "tanh", 1
    _, faults = graft_elementwise.backend("triton")(h, h, alpha, *rest)
    graft_elementwise_backward.backend("triton")(h, h, alpha, faults, *rest, True, False, True)
    expected = variants("elementwise", "tanh", None, dtype, biased=shifted)
    assert [(name, fixed(c)) for name, c in asked] == [(v.kernel.__name__, fixed(v.constants)) for v in expected]


@pytest.fixture
def only_asked(asked, monkeypatch):
    """The same, and nothing is launched: what would be computed is not looked at."""
    ask = launcher.choose

    def spy(*arguments, **tuned):
        return ask(*arguments, **tuned)[0], lambda *_: None

    for module in (launcher, triton_blend, triton_elementwise):
        monkeypatch.setattr(module, "choose", spy)
    return asked


def names_and_constants(found):
    return [(v.kernel.__name__, fixed(v.constants)) for v in found]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("replaces", [False, True], ids=["residual", "replace"])
@pytest.mark.parametrize("width", [64, 72])
@pytest.mark.parametrize("rank", [8, 40, 100])
@pytest.mark.parametrize("family", BANK_FAMILIES)
def test_what_is_tuned_is_asked_for(only_asked, family, rank, width, replaces, dtype):
    """A candidate that the workload does not ask for could not be measured."""
    activation, biased = (None, False) if family == "lowrank" else ("gelu", True)
    request = Request(family, activation, None, rank, biased, width % 16 == 0, (dtype,), (90,), replaces)
    for direction in ("forward", "backward"):
        only_asked.clear()
        load = tuning._workload(request, dtype, width, width, direction, DEVICE)
        with registry.use_backend("triton"):
            load.run()
        compiled = [v for v in kernels_for(request, dtype) if v.direction == direction]
        assert [(name, fixed(c)) for name, c in only_asked] == names_and_constants(compiled)


@pytest.mark.parametrize("replaces", [False, True], ids=["residual", "replace"])
@pytest.mark.parametrize("family", [*BANK_FAMILIES, "elementwise"])
def test_a_layer_in_training_asks_for_what_is_compiled(only_asked, family, replaces):
    """All it is made of has a gradient, as in the midst of a network."""

    def leaf(*shape):
        return torch.ones(*shape, device=DEVICE, requires_grad=True)

    x, h, alpha = leaf(2, 16), leaf(2, 16), torch.full((1,), 0.5, device=DEVICE)
    gated, biased = family == "gated", family != "lowrank"
    activation = "silu" if biased else None
    with registry.use_backend("triton"):
        if family == "elementwise":
            y, _ = blend_elementwise(x, h, alpha, leaf(1, 16), leaf(1, 16), [0, 0, 16, int(replaces)], activation, 1)
        else:
            value, value_bias = (leaf(3, 16), leaf(3)) if gated else (None, None)
            weights = leaf(3, 16), value, leaf(3, 16), leaf(3) if biased else None, value_bias
            y, _ = blend_bank(x, h, alpha, *weights, [0, 0, 16, int(replaces), 0, 3], activation)
        y.sum().backward()
    compiled = variants(family, activation, None, "fp32", rank=3, biased=biased, replaces=replaces)
    assert [(name, fixed(c)) for name, c in only_asked] == names_and_constants(compiled)
