"""The CUDA driver found at run time: what is asked of it, how arguments are packed, and what is said when it fails."""

from __future__ import annotations

import gc
import json
import re
import shutil
import struct
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from esper.ops import native
from esper.ops.cubin import hidden_pointers
from tests.ops import recorder as recording
from tests.ops.recorder import Recorder, tiny_cubin

extension = native.load()
pytestmark = pytest.mark.skipif(extension is None, reason=f"needs the extension: {native.reason()}")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Recorder:
    return recording.build(tmp_path_factory.mktemp("recorder"))


@pytest.fixture
def recorder(library: Recorder) -> Recorder:
    gc.collect()
    library.reset()
    return library


@pytest.fixture
def driver(recorder: Recorder) -> Any:
    return extension.Driver(recorder.path)


def launcher(driver: Any, *types: str, hidden: int = 2, num_warps: int = 4, shared: int = 0) -> Any:
    function = driver.load(tiny_cubin(), 0).function("k")
    return function.launcher(
        [(f"a{i}", kind) for i, kind in enumerate(types)], hidden=hidden, num_warps=num_warps, shared=shared
    )


def arguments(line: str) -> list[bytes]:
    return [bytes.fromhex(each) for each in line.split(" args ")[1].split()]


def test_a_missing_driver_is_named_in_the_systems_words(tmp_path):
    with pytest.raises(
        extension.DriverError, match=r"the CUDA driver does not load: .*nothing\.so.*cannot open shared"
    ):
        extension.Driver(str(tmp_path / "nothing.so"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a driver")
def test_a_machine_without_a_driver_says_so():
    assert native.driver() is None
    assert "CUDA driver" in native.driver_reason()


def test_another_library_is_no_driver():
    with pytest.raises(extension.DriverError, match="has no function cuInit; it is too old"):
        extension.Driver("libm.so.6")


def test_a_driver_that_does_not_start(recorder):
    recorder.fail("cuInit", 3)
    with pytest.raises(extension.DriverError, match=r"cuInit: CUDA_ERROR_TEST \(3\): a test's failure"):
        extension.Driver(recorder.path)


def test_devices(driver):
    assert (driver.version, driver.device_count(), driver.capability(1)) == (13000, 2, (9, 0))
    with pytest.raises(extension.DriverError, match=r"cuDeviceGet\(2\): .* \(101\)"):
        driver.capability(2)


def test_a_thread_says_how_it_looks_at_captures(driver, recorder):
    assert [driver.exchange_capture_mode(mode) for mode in (1, 2, 0)] == [0, 1, 2]
    assert recorder.take() == ["captures 1", "captures 2", "captures 0"]


def test_arguments_are_packed_by_type(driver, recorder):
    tensor = torch.zeros(16)
    types = ("*bf16", "*fp32", "*i8", "i1", "i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64", "fp32", "fp64")
    values = (tensor, 0x1000, None, True, -3, -300, -70000, -(2**40), 200, 60000, 2**32 - 1, 2**64 - 1, 1.5, -0.1)
    launch = launcher(driver, *types, num_warps=8, shared=1024)
    recorder.sizes(8, 8, 8, 1, 1, 2, 4, 8, 1, 2, 4, 8, 4, 8, 8, 8)
    recorder.take()
    assert launch(3, 4, 5, 0xABC, *values) is True
    pushed, line, popped = recorder.take()
    assert (pushed, popped) == ("push 110", "pop 110")
    assert line.startswith("launch 9 grid 3 4 5 block 256 1 1 shared 1024 stream abc extra 0 context 110 args ")
    codes = "QQQ?bhiqBHIQfd"
    expected = (tensor.data_ptr(), 0x1000, 0, *values[3:])
    packed = [struct.pack(f"<{code}", value) for code, value in zip(codes, expected, strict=True)]
    assert arguments(line) == [*packed, bytes(8), bytes(8)]


def test_whole_numbers_are_floats_too(driver, recorder):
    launch = launcher(driver, "fp32", hidden=0)
    recorder.sizes(4)
    recorder.take()
    launch(1, 1, 1, 0, 3)
    assert arguments(recorder.take()[1]) == [struct.pack("<f", 3)]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("i32", 2**31),
        ("i32", -(2**31) - 1),
        ("i64", 2**63),
        ("u8", -1),
        ("u64", -1),
        ("u64", 2**64),
        ("i8", 128),
        ("*fp32", 0x1008),
    ],
)
def test_values_the_kernel_was_not_made_for_are_left_to_the_caller(driver, recorder, kind, value):
    launch = launcher(driver, kind)
    recorder.take()
    assert launch(1, 1, 1, 0, value) is False
    assert recorder.take() == []


def test_a_view_that_starts_between_two_alignments_is_left_to_the_caller(driver):
    x = torch.zeros(16)
    launch = launcher(driver, "*fp32")
    assert launch(1, 1, 1, 0, x)
    assert not launch(1, 1, 1, 0, x[1:])
    assert launch(1, 1, 1, 0, x[4:])


def test_an_empty_grid_launches_nothing(driver, recorder):
    launch = launcher(driver, "i32")
    recorder.take()
    assert launch(4, 0, 1, 0, 1) is True
    assert recorder.take() == []


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ((1, 1, 1, 0), TypeError, "k takes grid x, y, z, stream and 2 arguments, not 4 values in all"),
        ((1, 1, 1, 0, None, 1, 2), TypeError, "not 7 values in all"),
        ((1, 1, 1, 0, "text", 1), TypeError, "k: argument 'a0' is str, which is no tensor, address or None"),
        ((1, 1, 1, 0, 1.5, 1), TypeError, "k: argument 'a0' is float"),
        ((1, 1, 1, 0, -16, 1), TypeError, "k: argument 'a0' is int"),
        ((1, 1, 1, 0, None, 1.5), TypeError, "k: argument 'a1' is float, which is no i32"),
        ((1, 1, 1, 0, None, None), TypeError, "k: argument 'a1' is NoneType, which is no i32"),
        ((-1, 1, 1, 0, None, 1), OverflowError, "negative"),
        ((2**31, 1, 1, 0, None, 1), OverflowError, "k: a grid of 2147483648 is too large"),
        (("1", 1, 1, 0, None, 1), TypeError, "int"),
        ((1, 1, 1, None, None, 1), TypeError, "int"),
    ],
)
def test_mistakes_are_named(driver, recorder, values, error, message):
    launch = launcher(driver, "*fp32", "i32")
    recorder.take()
    with pytest.raises(error, match=message):
        launch(*values)
    assert recorder.take() == []


def test_keywords_are_refused(driver):
    with pytest.raises(TypeError, match="k: arguments of a launch are given by position"):
        launcher(driver, "i32")(1, 1, 1, stream=0, a0=1)


def test_a_failing_launch_says_which_kernel_and_why(driver, recorder):
    launch = launcher(driver, "i32")
    recorder.fail("cuLaunchKernel", 700)
    with pytest.raises(extension.DriverError, match=r"k: cuLaunchKernel: CUDA_ERROR_TEST \(700\): a test's failure"):
        launch(1, 1, 1, 0, 1)


@pytest.mark.parametrize("kind", ["fp16", "bf16", "tensordesc", "", "i128", "pointer"])
def test_types_that_are_not_passed(driver, kind):
    with pytest.raises(ValueError, match=r"argument 'a0' has type .* a launch passes pointers"):
        launcher(driver, kind)


@pytest.mark.parametrize("changes", [{"num_warps": 0}, {"num_warps": 33}, {"shared": -1}, {"hidden": 64}])
def test_bad_plans(driver, changes):
    with pytest.raises(ValueError, match=r"num_warps|shared|arguments"):
        launcher(driver, "i32", **changes)


def test_much_shared_memory_is_asked_for_once(driver, recorder):
    recorder.take()
    launcher(driver, "i32", shared=48 * 1024)
    assert not [line for line in recorder.take() if line.startswith("set")]
    launcher(driver, "i32", shared=48 * 1024 + 1)
    assert [line for line in recorder.take() if line.startswith("set")] == ["set 8=49153"]
    recorder.fail("cuFuncSetAttribute", 1)
    with pytest.raises(extension.DriverError, match="k needs 200000 bytes of shared memory: CUDA_ERROR_TEST"):
        launcher(driver, "i32", shared=200000)


def test_a_binary_is_loaded_in_its_devices_context_and_goes_with_its_last_launcher(driver, recorder):
    module = driver.load(memoryview(tiny_cubin()), 1)
    launch = module.function("k").launcher([], hidden=0, num_warps=1, shared=0)
    assert recorder.take() == ["retain 11", "push 111", "load in 111", "pop 111", "push 111", "pop 111"]
    del module
    launch(1, 1, 1, 0)
    assert "context 111" in recorder.take()[1]
    del launch
    assert recorder.take() == ["push 111", "unload 7", "pop 111"]


def test_the_context_is_retained_once_and_released(recorder):
    driver = extension.Driver(recorder.path)
    modules = [driver.load(tiny_cubin(), 0) for _ in range(3)]
    assert [line for line in recorder.take() if line.startswith("retain")] == ["retain 10"]
    del modules, driver
    assert recorder.take()[-1] == "release 10"


def test_a_kernel_that_is_not_there(driver):
    with pytest.raises(extension.DriverError, match=r"no kernel 'missing' in the GPU binary: .* \(500\)"):
        driver.load(tiny_cubin(), 0).function("missing")


def test_a_binary_the_driver_refuses_comes_with_the_drivers_log(driver, recorder):
    recorder.fail("cuModuleLoadDataEx", 222)
    with pytest.raises(extension.DriverError, match=r"UNSUPPORTED_PTX_VERSION .* log: line 1: the log"):
        driver.load(tiny_cubin(), 0)


def _altered(at: int, value: bytes) -> bytes:
    data = bytearray(tiny_cubin())
    data[at : at + len(value)] = value
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".version 9.0\n.target sm_90\n",
        b"\x7fELF" + bytes(60),
        tiny_cubin()[:63],
        tiny_cubin()[:-1],
        _altered(40, b"\xff" * 8),
        _altered(58, b"\x20\x00"),
        _altered(60, b"\xff\xff"),
        _altered(len(tiny_cubin()) - 64 + 32, b"\xff" * 8),
        _altered(len(tiny_cubin()) - 64 + 24, b"\xff" * 8),
        _altered(56, b"\xff\xff"),
    ],
)
def test_bytes_that_are_no_whole_binary_never_reach_the_driver(driver, recorder, data):
    recorder.take()
    with pytest.raises(extension.DriverError, match=r"not a GPU binary|cut short or damaged"):
        driver.load(data, 0)
    assert recorder.take() == []


def test_bytes_with_gaps_are_refused(driver):
    with pytest.raises(ValueError, match="a run of bytes"):
        driver.load(memoryview(tiny_cubin())[::2], 0)


def test_attributes(driver):
    assert driver.load(tiny_cubin(), 0).function("k").attribute(4) == 77


def test_it_says_what_it_is(driver):
    launch = launcher(driver, "*bf16", "i64", num_warps=2, shared=64)
    assert repr(launch) == "<Launcher of k(a0: *bf16, a1: i64), 64 threads, 64 bytes of shared memory>"
    with pytest.raises(TypeError, match="cannot create"):
        type(launch)()


def test_many_threads_launch_at_once(driver, recorder):
    launch = launcher(driver, "*fp32", "i64", "fp64", hidden=0)
    recorder.sizes(8, 8, 8)
    recorder.take()
    count, threads = 25, 6

    def work(number: int) -> None:
        for i in range(count):
            launch(number + 1, 1, 1, number, 16 * number, i, number + i / 64)

    started = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    lines = [line for line in recorder.take() if line.startswith("launch")]
    expected = {
        (number + 1, struct.pack("<Q", 16 * number), struct.pack("<q", i), struct.pack("<d", number + i / 64))
        for number in range(threads)
        for i in range(count)
    }
    assert {(int(line.split()[3]), *arguments(line)) for line in lines} == expected
    assert len(lines) == count * threads


def test_what_we_declare_is_what_cudas_header_declares():
    """Sizes and order of parameters, numbers, and which version of a function a name stands for today."""
    triton = pytest.importorskip("triton")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None or not (include / "cuda.h").exists():
        pytest.skip("needs a C++ compiler and the cuda.h that comes with Triton")
    root = Path(__file__).parents[2]
    source = Path(__file__).with_name("driver_abi.cpp")
    command = [compiler, "-std=c++17", "-I", str(root / "csrc"), "-I", str(include), str(source)]
    checked = subprocess.run([*command, "-fsyntax-only"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    expanded = subprocess.run([*command, "-E", "-P"], capture_output=True, text=True, check=True).stdout
    names = re.findall(r'"(cu\w+)"', expanded.rpartition("names[]")[2])
    looked_up = re.findall(r'find\(library_, "(cu\w+)"', (root / "csrc" / "driver.cpp").read_text())
    assert sorted(names) == sorted(looked_up)


KERNEL = """
import json, sys
sys.path.insert(0, {folder!r})
import triton
import triton.language as tl
from esper.ops import aot
import demo
case = aot.cases(demo)[0]
made = aot.compile_case(case, int(sys.argv[1]), line_info=False)
open(sys.argv[2], "wb").write(made.cubin)
print(json.dumps([made.symbol, made.resources.registers, made.resources.shared]))
"""


@pytest.mark.gpu
def test_a_compiled_kernel_computes_the_same_as_torch(tmp_path):
    """Compiled ahead of time in another process, loaded from its bytes, launched from here on torch's stream."""
    (tmp_path / "demo.py").write_text(
        textwrap.dedent("""
            import triton
            import triton.language as tl

            @triton.jit
            def axpy_kernel(x, y, n, a, BLOCK: tl.constexpr):
                i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
                tl.store(y + i, a * tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)

            AOT = [(axpy_kernel, {"x": "*fp32", "y": "*fp32", "n": "i32", "a": "fp32"}, {"BLOCK": 256})]
        """)
    )
    driver = native.driver()
    major, minor = driver.capability(0)
    command = [sys.executable, "-c", KERNEL.format(folder=str(tmp_path)), str(10 * major + minor), str(tmp_path / "c")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    symbol, registers, shared = json.loads(out.splitlines()[-1])
    data = (tmp_path / "c").read_bytes()
    function = driver.load(data, 0).function(symbol)
    assert function.attribute(4) == registers
    types = [("x", "*fp32"), ("y", "*fp32"), ("n", "i32"), ("a", "fp32")]
    hidden = hidden_pointers(data, symbol, [kind for _, kind in types])
    launch = function.launcher(types, hidden=hidden, num_warps=4, shared=shared)
    x, y = torch.randn(1000, device="cuda"), torch.randn(1000, device="cuda")
    expected = 0.5 * x + y
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    assert launch(4, 1, 1, stream.cuda_stream, x, y, 1000, 0.5)
    stream.synchronize()
    torch.testing.assert_close(y, expected)
    # From a thread that has no context yet, too.
    worker = threading.Thread(target=lambda: launch(4, 1, 1, 0, x, y, 1000, 1.0))
    worker.start()
    worker.join()
    torch.cuda.synchronize()
    torch.testing.assert_close(y, expected + x)
