"""Binaries from artifacts: what they say of themselves, which of them are used, and why others are not."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.ops import binaries, cubin, native
from esper.ops.binaries import BinaryTable, Kernel
from esper.ops.cubin import CubinError, Parameter
from tests.ops.recorder import Recorder, tiny_cubin

extension = native.load()
needs_extension = pytest.mark.skipif(extension is None, reason=f"needs the extension: {native.reason()}")

#: One kernel: demo_kernel(x, n, SHAPE, BLOCK_M), compiled for two types.
KERNELS = {
    "demo_kernel": Kernel(
        ("x", "n", "SHAPE", "BLOCK_M"),
        frozenset({(("x", "*bf16"), ("n", "i32")), (("x", "*fp32"), ("n", "i32"))}),
    )
}


@dataclass(frozen=True)
class Entry:
    arch: str = "sm_90"
    dtype: str = "bf16"
    kernel: str = "demo_kernel"
    symbol: str = "k"
    signature: tuple[tuple[str, str], ...] = (("x", "*bf16"), ("n", "i32"))
    constants: dict[str, Any] = field(default_factory=lambda: {"SHAPE": 2, "BLOCK_M": 64})
    num_warps: int = 4
    shared: int = 0
    sha256: str = "a"


@dataclass(frozen=True)
class Binary:
    entry: Entry
    data: memoryview


def binary(arch: int = 90, **changes: Any) -> Binary:
    return Binary(replace(Entry(), arch=f"sm_{arch}", **changes), memoryview(tiny_cubin("k", (8, 4, 8, 8), arch)))


@pytest.fixture
def table(recorder: Recorder) -> BinaryTable:
    driver = extension.Driver(recorder.path)  # its devices say sm_90
    return BinaryTable(lambda: driver, lambda: KERNELS)


def test_parameters_and_architecture_are_read_from_the_binary():
    data = tiny_cubin("some_kernel", (8, 4, 1), arch=103)
    assert cubin.architecture(data) == 103
    assert cubin.parameters(data, "some_kernel") == [Parameter(0, 0, 8), Parameter(1, 8, 4), Parameter(2, 16, 1)]
    with pytest.raises(CubinError, match="has no kernel 'other'"):
        cubin.parameters(data, "other")


@pytest.mark.parametrize("types", [["*fp32"], ["*fp32", "i32"], ["*bf16", "fp32"], []])
def test_pointers_behind_the_arguments_are_counted(types):
    sizes = tuple(cubin.parameter_size(kind) for kind in types)
    assert cubin.hidden_pointers(tiny_cubin("k", (*sizes, 8, 8)), "k", types) == 2
    assert cubin.hidden_pointers(tiny_cubin("k", sizes), "k", types) == 0


@pytest.mark.parametrize("types", [["i32"], ["*fp32", "i64"], ["*fp32", "i32", "i32"], ["*fp32"]])
def test_other_arguments_than_the_binarys_are_found_out(types):
    with pytest.raises(CubinError, match=r"takes parameters of \[8, 4\] bytes"):
        cubin.hidden_pointers(tiny_cubin("k", (8, 4)), "k", types)
    with pytest.raises(CubinError, match="'fp16' is not one that a launch passes"):
        cubin.hidden_pointers(tiny_cubin("k", (8, 4)), "k", ["*fp32", "fp16"])


@given(st.binary(max_size=300) | st.data())
def test_any_bytes_are_read_or_refused(drawn):
    if not isinstance(drawn, bytes):
        data = bytearray(tiny_cubin())
        for _ in range(drawn.draw(st.integers(1, 8))):
            data[drawn.draw(st.integers(0, len(data) - 1))] = drawn.draw(st.integers(0, 255))
        drawn = bytes(data[: drawn.draw(st.integers(0, len(data)))])
    for read in (cubin.architecture, lambda data: cubin.parameters(data, "k")):
        with contextlib.suppress(CubinError):
            read(drawn)


@pytest.mark.parametrize(
    ("built", "present", "runs"),
    [
        (80, 80, True),
        (80, 86, True),
        (80, 89, True),
        (86, 80, False),
        (86, 89, True),
        (80, 90, False),
        (90, 90, True),
        (90, 80, False),
        # Triton builds "sm_90a" and so on: for one architecture alone.
        (100, 100, True),
        (100, 103, False),
        (120, 121, False),
    ],
)
def test_what_runs_where(built, present, runs):
    assert cubin.runs_on(built, present) is runs


@needs_extension
def test_a_binary_is_found_by_kernel_dtype_constants_and_device(table):
    assert table.add([binary()], 0) == ()
    found = table.find("demo_kernel", "bf16", {"BLOCK_M": 64, "SHAPE": 2}, 0)
    assert found.constants == {"SHAPE": 2, "BLOCK_M": 64}
    assert repr(found.launch).startswith("<Launcher of k(x: *bf16, n: i32), 128 threads")
    assert table.find("other_kernel", "bf16", {"BLOCK_M": 64, "SHAPE": 2}, 0) is None
    assert table.find("demo_kernel", "fp32", {"BLOCK_M": 64, "SHAPE": 2}, 0) is None
    assert table.find("demo_kernel", "bf16", {"BLOCK_M": 64, "SHAPE": 3}, 0) is None
    assert table.find("demo_kernel", "bf16", {"BLOCK_M": 64, "SHAPE": 2}, 1) is None
    assert table.handed_out == 1
    table.add([binary()], 1)
    assert table.find("demo_kernel", "bf16", {"BLOCK_M": 64, "SHAPE": 2}, 1).device == 1


@needs_extension
def test_other_tile_sizes_are_for_callers_that_take_them(table):
    table.add([binary(constants={"SHAPE": 2, "BLOCK_M": 128}, sha256="b")], 0)
    asked = {"SHAPE": 2, "BLOCK_M": 64}
    assert table.find("demo_kernel", "bf16", asked, 0) is None
    assert table.find("demo_kernel", "bf16", asked, 0, tuned=True).constants["BLOCK_M"] == 128
    table.add([binary()], 0)
    assert table.find("demo_kernel", "bf16", asked, 0).constants["BLOCK_M"] == 64
    # A tile that must hold a whole bank is no matter of tuning.
    assert table.find("demo_kernel", "bf16", {"SHAPE": 2, "BLOCK_M": 64, "BLOCK_R": 16}, 0, tuned=True) is None


@needs_extension
def test_the_same_bytes_are_loaded_once_a_device(table, recorder):
    recorder.take()
    for _ in range(3):
        assert table.add([binary(), binary()], 0) == ()
    assert [line for line in recorder.take() if line.startswith("load")] == ["load in 110"]


@needs_extension
def test_hidden_pointers_are_given_as_null(table, recorder):
    table.add([binary()], 0)
    recorder.sizes(8, 4, 8, 8)
    recorder.take()
    table.find("demo_kernel", "bf16", {"BLOCK_M": 64, "SHAPE": 2}, 0).launch(1, 1, 1, 0, 0x10, 5)
    assert recorder.take()[1].endswith("args 1000000000000000 05000000 0000000000000000 0000000000000000 ")


@needs_extension
def test_of_several_architectures_the_one_that_fits_is_taken(table, recorder):
    assert table.add([binary(80, sha256="80"), binary(90), binary(100, sha256="100")], 0) == ()
    assert len([line for line in recorder.take() if line.startswith("load")]) == 1


@needs_extension
@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (binary(80), "GPU binary demo_kernel (bf16) is not used: it is for sm_80, not for sm_90"),
        (binary(arch=100), "it is for sm_100, not for sm_90"),
        (replace(binary(), data=memoryview(tiny_cubin("k", (8, 4), 80))), "declared for sm_90 and was built for sm_80"),
        (binary(kernel="gone_kernel"), "this version of Esper has no kernel of that name"),
        (
            binary(signature=(("n", "i32"), ("x", "*bf16"))),
            "its arguments (n, x, SHAPE, BLOCK_M) are not this version's",
        ),
        (binary(constants={"SHAPE": 2}), "its arguments (x, n, SHAPE) are not this version's (x, n, SHAPE, BLOCK_M)"),
        (binary(constants={"SHAPE": 2, "BLOCK_M": 1, "MORE": 1}), "are not this version's"),
        (binary(signature=(("x", "*fp16"), ("n", "i32"))), "never compiled with these types (x: *fp16, n: i32)"),
        (replace(binary(), data=memoryview(tiny_cubin("k", (8, 8)))), "takes parameters of [8, 8] bytes"),
        (binary(symbol="absent"), "has no kernel 'absent'"),
        (replace(binary(), data=memoryview(b"rubbish")), "not a GPU binary"),
    ],
)
def test_what_does_not_fit_is_left_out_with_the_reason(table, recorder, given, reason):
    recorder.take()
    reasons = table.add([given], 0)
    assert len(reasons) == 1
    assert reason in reasons[0]
    assert not [line for line in recorder.take() if line.startswith("load")]
    assert table.find("demo_kernel", "bf16", given.entry.constants, 0) is None


@needs_extension
def test_one_bad_binary_keeps_no_other_out(table):
    good = binary(dtype="fp32", signature=(("x", "*fp32"), ("n", "i32")), sha256="c")
    assert len(table.add([binary(kernel="gone_kernel"), good], 0)) == 1
    assert table.find("demo_kernel", "fp32", {"BLOCK_M": 64, "SHAPE": 2}, 0)


@needs_extension
def test_a_refusal_by_the_driver_is_a_reason(table, recorder):
    recorder.fail("cuModuleLoadDataEx", 222)
    (reason,) = table.add([binary()], 0)
    assert "UNSUPPORTED_PTX_VERSION" in reason
    recorder.fail("", 0)
    assert table.add([binary()], 0) == ()


def test_a_machine_without_a_driver_uses_none():
    table = BinaryTable(lambda: None, lambda: KERNELS)
    assert table.add([], 0) == ()
    (reason,) = table.add([binary(), binary()], 0)
    assert reason.startswith("GPU binaries are not used: ")


@needs_extension
def test_forgetting_unloads_what_nobody_holds(table, recorder):
    table.add([binary()], 0)
    recorder.take()
    table.clear()
    assert "unload 7" in recorder.take()
    assert table.find("demo_kernel", "bf16", {"BLOCK_M": 64, "SHAPE": 2}, 0) is None


def test_the_packages_kernels_are_known_by_what_they_list():
    known = binaries.package_kernels()
    from esper.kernels import lattice

    step = known["lattice_step_kernel"]
    assert step.arguments == tuple(lattice.lattice_step_kernel.arg_names)
    assert (("storage", "*u8"), ("rows", "i64"), ("epoch", "i32")) in step.signatures
