"""esper.compile: from a blueprint to a published artifact."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
import torch

import esper
from esper.artifacts import Artifact, FileRegistry, open_registry
from esper.artifacts.signing import SigningKey
from esper.blueprints import get, initialise, names
from esper.contracts.errors import BlueprintError, EsperError, RegistryUnavailableError
from esper.ops import toolchain
from esper.ops.toolchain import Built
from esper.services.tezzeret.forge import CompileError, build, compile_blueprint
from esper.services.tezzeret.pipelines import ARCHITECTURES, MachineError


@pytest.fixture
def registry(tmp_path):
    return FileRegistry(tmp_path / "registry")


def opened(registry: FileRegistry, artifact_id: str) -> Artifact:
    artifact = Artifact.open(bytes(asyncio.run(registry.fetch(artifact_id))))
    assert artifact.artifact_id == artifact_id
    return artifact


def test_it_is_the_public_name():
    assert esper.compile is compile_blueprint
    with pytest.raises(TypeError, match=r"^compile\(\) missing"):
        esper.compile("bottleneck")  # type: ignore[call-arg]


def test_by_name_with_options(registry):
    artifact = opened(registry, esper.compile("lowrank", d_in=6, d_out=4, registry=registry, rank=3, mode="replace"))
    assert artifact.blueprint == get("lowrank", rank=3, mode="replace")
    assert artifact.tensors()["down.weight"].shape == (3, 6)
    assert artifact.tensors()["up.weight"].shape == (4, 3)
    expected = initialise(artifact.blueprint, 6, 4, 0)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in artifact.tensors().items())
    assert artifact.manifest.tools == {"esper": esper.__version__, "torch": torch.__version__}


def test_a_blueprint_with_its_parameters_bound(registry):
    blueprint = get("bottleneck")
    artifact = opened(registry, esper.compile(blueprint, d_in=6, d_out=4, registry=registry, rank=3))
    assert artifact.blueprint.parameters == {"rank": 3}
    assert artifact.tensors()["down.weight"].shape == (3, 6)


@pytest.mark.parametrize("dtype", ["float64", torch.float16, "torch.bfloat16"])
def test_dtype(registry, dtype):
    artifact = opened(registry, esper.compile("lowrank", d_in=6, d_out=4, registry=registry, dtype=dtype))
    assert {str(tensor.dtype).split(".")[1] for tensor in artifact.tensors().values()} == {str(dtype).split(".")[-1]}


def test_every_way_to_name_a_registry(registry, monkeypatch):
    monkeypatch.setenv("ESPER_REGISTRY", registry.url)
    ways = (registry, registry.url, str(registry.folder), None, open_registry(registry.folder))
    ids = {esper.compile("lowrank", d_in=6, d_out=4, registry=way) for way in ways}
    assert len(ids) == 1
    assert [line.artifact_id for line in asyncio.run(registry.list())] == [*ids]


def test_any_client_and_a_running_loop(registry):
    class Client:
        url = "test://"

        async def fetch(self, artifact_id, *, max_bytes):
            raise NotImplementedError

        async def publish(self, data):
            return await registry.publish(data)

        async def list(self, *, prefix=""):
            raise NotImplementedError

        async def describe(self, artifact_id):
            raise NotImplementedError

    async def main():
        return esper.compile("lowrank", d_in=6, d_out=4, registry=Client())

    opened(registry, asyncio.run(main()))


def test_what_counts_for_the_id():
    def made(**changes):
        return Artifact.open(build("lowrank", **{"d_in": 6, "d_out": 4, **changes})).artifact_id

    changes = [{}, {"seed": 1}, {"d_in": 7}, {"d_out": 5}, {"rank": 2}, {"dtype": "float16"}, {"mode": "replace"}]
    changes += [{"provenance": {"by": "me"}}]
    assert len({made(**change) for change in changes}) == len(changes)


def test_same_bytes_in_another_process_whatever_the_global_generator():
    torch.manual_seed(123)
    here = Artifact.open(build("gated", d_in=6, d_out=4, seed=5)).sha256
    program = """
import torch, hashlib
torch.rand(7)
from esper.services.tezzeret.forge import build
print(hashlib.sha256(build("gated", d_in=6, d_out=4, seed=5)).hexdigest())
"""
    command = [sys.executable, "-c", program]
    there = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.strip()
    assert there == here


@pytest.mark.parametrize("blueprint", names())
def test_there_are_kernels_for_every_blueprint(monkeypatch, blueprint):
    """At least the blend's, forward and backward."""
    asked = []
    monkeypatch.setattr(toolchain, "compile_request", lambda request: asked.append(request) or [built()])
    build(blueprint, d_in=8, d_out=8, pipeline="standard")
    for dtype in toolchain.DTYPES:
        found = toolchain.kernels_for(asked[0], dtype)
        assert {variant.direction for variant in found} == {"forward", "backward"}


@pytest.mark.aot
@pytest.mark.parametrize("blueprint", ["dense", "elementwise", "normed_bottleneck"])
def test_binaries_of_families_that_are_no_bank(blueprint):
    key = SigningKey.generate()
    data = build(blueprint, d_in=16, d_out=16, pipeline="standard", architectures=["sm_90"], sign_with=key)
    binaries = Artifact.open(data, trusted_keys=[key.public]).binaries
    assert {binary.entry.direction for binary in binaries} == {"forward", "backward"}


class Driver:
    """A GPU, as far as it is asked for its name."""

    def capability(self, device):
        return 9, 0


@pytest.mark.parametrize(
    ("driver", "architectures", "error", "message"),
    [
        (None, [], MachineError, "needs a GPU to tune on"),
        (None, ["sm_90"], MachineError, "needs a GPU to tune on"),
        (Driver(), ["sm_80"], MachineError, "tunes for the GPU of this machine, which is sm_90, and not for sm_80"),
        # These would be no better elsewhere.
        (Driver(), ["sm_80", "sm_90"], CompileError, "and not for sm_80, sm_90"),
        (None, ["sm_80", "sm_90"], CompileError, "needs a GPU to tune on"),
        (Driver(), [], CompileError, "the compiler crashed"),
    ],
)
def test_what_a_machine_lacks_is_told_from_what_is_wrong(monkeypatch, driver, architectures, error, message):
    def crash(*_):
        raise toolchain.ToolchainError("the compiler crashed")

    monkeypatch.setattr("esper.ops.native.driver", lambda: driver)
    monkeypatch.setattr(toolchain, "_in_child", crash)
    with pytest.raises(CompileError, match=message) as caught:
        build("lowrank", d_in=6, d_out=4, pipeline="aggressive", architectures=architectures)
    assert type(caught.value) is error


def built(**changes):
    values = {
        "kernel": "demo_kernel",
        "direction": "forward",
        "arch": 90,
        "dtype": "fp32",
        "symbol": "demo_kernel",
        "signature": (("x", "*fp32"), ("n", "i32")),
        "constants": {"BLOCK": 64},
        "num_warps": 4,
        "shared": 1024,
        "registers": 40,
        "spills": 0,
        "tools": {"triton": "3.9.0", "ptxas": "13.4"},
        "cubin": b"code",
    }
    return Built(**{**values, **changes})


def test_what_the_compiler_is_asked_for(registry, monkeypatch):
    asked = []
    monkeypatch.setattr("esper.ops.toolchain.compile_request", lambda request: asked.append(request) or [built()])
    esper.compile("gated", d_in=6, d_out=4, registry=registry, rank=3, pipeline="standard", dtype="float16")
    esper.compile(
        "bottleneck",
        d_in=6,
        d_out=4,
        registry=registry,
        bias=False,
        pipeline="standard",
        dtype="float64",
        compute_dtypes=["bf16", torch.float32, "bf16"],
        architectures=["sm_90", "sm_86", "sm_90"],
    )
    gated, bottleneck = asked
    assert (gated.family, gated.rank, gated.dtypes, gated.architectures) == ("gated", 3, ("fp16",), (80, 90, 100))
    assert (bottleneck.dtypes, bottleneck.architectures) == (("bf16", "fp32"), (86, 90))
    assert not bottleneck.biased
    assert not bottleneck.aligned
    esper.compile("lowrank", d_in=32, d_out=48, registry=registry, pipeline="standard")
    assert asked[-1].aligned and not asked[-1].replaces
    for shift in (True, False):
        esper.compile(
            "elementwise", d_in=6, d_out=6, registry=registry, shift=shift, mode="replace", pipeline="standard"
        )
        assert asked[-1].biased == shift and asked[-1].replaces


def test_binaries_have_the_names_of_the_format(monkeypatch):
    two = [
        built(),
        built(kernel="other_kernel", symbol="other", cubin=b"other"),
        built(direction="backward", cubin=b"b"),
    ]
    monkeypatch.setattr("esper.ops.toolchain.compile_request", lambda request: two)
    key = SigningKey.generate()
    data = build("lowrank", d_in=6, d_out=4, pipeline="standard", architectures=["sm_90"], sign_with=key)
    artifact = Artifact.open(data, trusted_keys=[key.public])
    assert {binary.name: bytes(binary.data) for binary in artifact.binaries} == {
        "gpu/sm_90/fp32/forward/demo_kernel": b"code",
        "gpu/sm_90/fp32/forward/other_kernel": b"other",
        "gpu/sm_90/fp32/backward": b"b",
    }
    entry = next(binary.entry for binary in artifact.binaries if binary.entry.kernel == "other_kernel")
    assert (entry.registers, entry.shared, entry.num_warps, entry.constants) == (40, 1024, 4, {"BLOCK": 64})
    assert Artifact.open(build("lowrank", d_in=6, d_out=4, pipeline="standard")).binaries == ()


def test_two_binaries_of_one_name_are_refused(monkeypatch):
    twice = [built(), built(constants={"BLOCK": 32})]
    monkeypatch.setattr("esper.ops.toolchain.compile_request", lambda request: twice)
    with pytest.raises(CompileError, match="two variants of demo_kernel"):
        build("lowrank", d_in=6, d_out=4, pipeline="standard")


@pytest.mark.parametrize(
    ("error", "changes", "message"),
    [
        (CompileError, {"pipeline": "quick"}, "unknown pipeline 'quick'; known: fast"),
        (CompileError, {"pipeline": None}, "unknown pipeline None"),
        (CompileError, {"architectures": ["sm_90"]}, "pipeline 'fast' builds no GPU binaries"),
        (CompileError, {"architectures": "sm_90", "pipeline": "standard"}, "must be a list of names"),
        (CompileError, {"architectures": ["sm_90a"], "pipeline": "standard"}, "unknown architecture 'sm_90a'"),
        (
            CompileError,
            {"architectures": [f"sm_{n}" for n in ARCHITECTURES], "pipeline": "standard"},
            "10 architectures are too many for one artifact: .*sm_80_sm_86.*; make several",
        ),
        (CompileError, {"dtype": "float64", "pipeline": "standard"}, "there are no GPU kernels for float64"),
        (CompileError, {"compute_dtypes": ["int8"]}, "'int8' cannot be stored"),
        (CompileError, {"dtype": "int8"}, "'int8' cannot be stored; possible: float64"),
        (CompileError, {"blueprint": {"nodes": []}}, "must be a Blueprint or the name of one .* not dict"),
        (BlueprintError, {"blueprint": "lowrnk"}, "lowrnk"),
        (BlueprintError, {"blueprint": get("lowrank"), "width": 3}, "no parameter 'width'; it has: rank"),
        (BlueprintError, {"d_in": 0}, "d_in must be an integer"),
        (BlueprintError, {"rank": -1}, "rank"),
        (BlueprintError, {"seed": -1}, "seed"),
        (BlueprintError, {"seed": True}, "seed"),
        (
            BlueprintError,
            {"blueprint": "dense", "bias": False, "d_in": 1 << 14, "d_out": 1 << 14, "dtype": "fp64"},
            "node 'linear': has the most of 2147483648 bytes of weights",
        ),
        (EsperError, {"registry": "ftp://user:secret@host"}, r"ftp://\*\*\*@host: unknown scheme"),
    ],
)
def test_refusals(registry, error, changes, message):
    arguments = {"blueprint": "lowrank", "d_in": 6, "d_out": 4, "registry": registry, **changes}
    with pytest.raises(error, match=message):
        esper.compile(arguments.pop("blueprint"), **arguments)
    assert not registry.folder.exists()


def test_a_registry_that_cannot_be_written(tmp_path):
    (tmp_path / "registry").write_text("")
    with pytest.raises(RegistryUnavailableError, match="cannot write"):
        esper.compile("lowrank", d_in=6, d_out=4, registry=str(tmp_path / "registry"))
