"""Every ready-made blueprint: builds, validates, costs what it says, and refuses what it does not know."""

from __future__ import annotations

from typing import Any

import pytest

from esper.blueprints import Blueprint, describe, from_json, get, names, to_json, validate
from esper.contracts.errors import BlueprintError

D_IN, D_OUT, RANK = 10, 6, 3


def test_there_are_enough() -> None:
    assert len(names()) >= 8
    assert {"lowrank", "bottleneck", "gated", "dense", "elementwise", "conv"} <= set(names())


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("tap", ["input", "output"])
@pytest.mark.parametrize("mode", ["residual", "replace"])
@pytest.mark.parametrize("scope", ["layer", "chunk"])
def test_every_entry_joins_every_way(name: str, tap: str, mode: str, scope: str) -> None:
    blueprint = get(name, tap=tap, mode=mode, scope=scope)
    assert (blueprint.tap, blueprint.mode, blueprint.scope, blueprint.name) == (tap, mode, scope, name)
    assert from_json(to_json(blueprint)) == blueprint
    validate(blueprint, 6, 6)


@pytest.mark.parametrize("name", names())
def test_documented_weight_count(name: str) -> None:
    entry = describe(name)
    same = name in ("elementwise", "activated_elementwise", "residual_block")
    d_in = D_OUT if same else D_IN
    resolved = validate(get(name, **({"rank": RANK} if "rank" in entry.defaults else {})), d_in, D_OUT)
    formula = entry.weights.replace("2 d_", "2*d_").replace("r (", "r*(").replace("d_out (", "d_out*(")
    formula = formula.replace("d_in kh kw", "d_in*kh*kw")
    count = eval(formula, {}, {"r": RANK, "d_in": d_in, "d_out": D_OUT, "kh": 3, "kw": 3})
    assert resolved.parameter_count == count


@pytest.mark.parametrize("name", names())
def test_every_parameter_does_something(name: str) -> None:
    """Whatever the defaults list, changing it changes the blueprint."""
    other: dict[str, Any] = {
        "rank": 5,
        "activation": "tanh",
        "norm": "rmsnorm" if describe(name).defaults.get("norm") == "layernorm" else "layernorm",
        "eps": 1e-3,
        "kernel_size": 5,
        "stride": 2,
        "padding": 0,
        "dilation": 2,
        "tap": "input" if describe(name).defaults["tap"] == "output" else "output",
        "mode": "residual" if describe(name).defaults["mode"] == "replace" else "replace",
        "scope": "chunk",
    }
    for key, default in describe(name).defaults.items():
        value = not default if isinstance(default, bool) else other[key]
        assert get(name, **{key: value}) != get(name), key


def test_rank_stays_a_parameter() -> None:
    assert dict(get("bottleneck", rank=5).parameters) == {"rank": 5}
    assert validate(get("bottleneck", rank=5), 4, 4, rank=2).tensors["up.weight"] == (4, 2)


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (5, 1), (3, 2), ((1, 7), 3), (1, 1)])
def test_default_padding_keeps_the_size(kernel: Any, dilation: int) -> None:
    resolved = validate(get("conv", kernel_size=kernel, dilation=dilation), 4, 4)
    assert all(axis.is_identity for axis in resolved.spatial)


@pytest.mark.parametrize(
    ("name", "params", "complaint"),
    [
        ("lowrnk", {}, "unknown blueprint 'lowrnk'; known: lowrank, bottleneck"),
        (3, {}, "unknown blueprint 3"),
        (["lowrank"], {}, "unknown blueprint"),
        ("lowrank", {"activation": "relu"}, "has no parameter 'activation'; it has: tap, mode, scope, rank"),
        ("lowrank", {"rank": 0}, "parameter 'rank' must be an integer"),
        ("lowrank", {"rank": True}, "not True"),
        ("lowrank", {"rank": "8"}, "not '8'"),
        ("lowrank", {"tap": "both"}, "tap must be"),
        ("bottleneck", {"activation": "swish"}, "node 'act': kind must be one of"),
        ("bottleneck", {"bias": 1}, "node 'down': bias must be"),
        ("normed_gated", {"norm": "batchnorm"}, "node 'norm': kind must be one of layernorm, rmsnorm"),
        ("normed_gated", {"eps": 0.0}, "node 'norm': eps"),
        ("elementwise", {"shift": "yes"}, "shift must be true or false"),
        ("conv", {"kernel_size": 0}, "node 'depthwise': kernel_size"),
        ("conv", {"stride": None}, "node 'depthwise': stride"),
        ("conv", {"padding": "same"}, "node 'depthwise': padding"),
    ],
)
def test_what_is_refused(name: Any, params: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BlueprintError, match=complaint):
        get(name, **params)


def test_optional_parts_can_be_left_out() -> None:
    def ops(blueprint: Blueprint) -> list[str]:
        return [node.op for node in blueprint.order]

    assert ops(get("bottleneck", activation=None)) == ["input", "linear", "linear", "output"]
    assert ops(get("normed_bottleneck", norm=None)) == ops(get("bottleneck"))
    assert ops(get("elementwise", shift=False)) == ["input", "scale", "output"]
