"""How a graft's kernel is launched: by a loaded binary or by Triton, and when that is decided anew."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from esper.ops import binaries, native
from esper.ops.binaries import BinaryTable, Kernel
from esper.ops.graft import triton as launcher
from tests.ops.recorder import Recorder, tiny_cubin

extension = native.load()
pytestmark = pytest.mark.skipif(extension is None, reason=f"needs the extension: {native.reason()}")

GPU = torch.device("cuda", 0)
SIGNATURE = (("x", "*bf16"), ("n", "i32"))
CONSTANTS = {"SHAPE": 2, "BLOCK_M": 64}
OPTIONS = {"num_warps": 4}


class DemoKernel:
    """In place of a jitted function: writes down how Triton would launch it."""

    def __init__(self) -> None:
        self.__name__ = "demo_kernel"
        self.launched: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **keywords: self.launched.append((grid, arguments, keywords))


@pytest.fixture
def kernel() -> DemoKernel:
    return DemoKernel()


@pytest.fixture
def table(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> BinaryTable:
    driver = extension.Driver(recorder.path)  # its devices say sm_90
    known = {"demo_kernel": Kernel(("x", "n", "SHAPE", "BLOCK_M"), frozenset({SIGNATURE}))}
    table = BinaryTable(lambda: driver, lambda: known)
    monkeypatch.setattr(binaries, "TABLE", table)
    monkeypatch.setattr(launcher, "_raw_stream", lambda index: 0xA0 + index)
    return table


def binary(**changes: Any) -> SimpleNamespace:
    entry = {
        "arch": "sm_90", "dtype": "bf16", "kernel": "demo_kernel", "symbol": "k", "signature": SIGNATURE,
        "constants": CONSTANTS, "num_warps": 4, "shared": 0, "sha256": repr(changes),
    }  # fmt: skip
    return SimpleNamespace(entry=SimpleNamespace(**(entry | changes)), data=memoryview(tiny_cubin("k", (8, 4, 8, 8))))


def choose(kernel: DemoKernel, **changes: Any) -> launcher.Choice:
    asked = {"dtype": "bf16", "device": GPU, "constants": CONSTANTS, "options": OPTIONS} | changes
    return launcher.choose(kernel, **asked)


def test_a_binary_is_launched_on_the_current_stream_of_its_device(table, recorder, kernel):
    table.add([binary()], 1)
    constants, launch = choose(kernel, device=torch.device("cuda", 1))
    assert constants == CONSTANTS
    recorder.take()
    launch(3, 0x10, 5)
    (line,) = [line for line in recorder.take() if line.startswith("launch")]
    assert "grid 3 1 1 block 128 1 1" in line and "stream a1" in line and "context 111" in line
    assert kernel.launched == []


def test_without_a_binary_triton_launches(table, kernel):
    constants, launch = choose(kernel)
    launch(3, 0x10, 5)
    assert constants == CONSTANTS
    assert kernel.launched == [((3,), (0x10, 5), CONSTANTS | OPTIONS)]


def test_what_a_binary_was_not_made_for_is_tritons(table, recorder, kernel):
    table.add([binary(constants={"SHAPE": 2, "BLOCK_M": 128})], 0)
    constants, launch = choose(kernel)
    assert constants["BLOCK_M"] == 128
    launch(3, 0x11, 5)  # not aligned to 16 bytes
    # The caller made its grid from the binary's tiles.
    assert kernel.launched == [((3,), (0x11, 5), {"SHAPE": 2, "BLOCK_M": 128, "num_warps": 4})]


def test_the_answer_is_made_once(table, kernel):
    table.add([binary()], 0)
    first = choose(kernel)
    assert choose(kernel, device=torch.device("cuda", 0), constants={**CONSTANTS}) is first
    assert table.handed_out == 1
    none = choose(kernel, dtype="fp32")
    assert choose(kernel, dtype="fp32") is none and none is not first


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "fp32"},
        {"device": torch.device("cuda", 1)},
        {"device": torch.device("cpu")},
        {"constants": {"SHAPE": 3, "BLOCK_M": 64}},
        {"constants": {"BLOCK_M": 2, "SHAPE": 64}},
        {"tuned": False, "constants": {"SHAPE": 2, "BLOCK_M": 32}},
    ],
)
def test_other_questions_have_other_answers(table, kernel, changes):
    table.add([binary()], 0)
    choose(kernel)
    constants, launch = choose(kernel, **changes)
    launch(1, 0x10, 5)
    assert kernel.launched == [((1,), (0x10, 5), changes.get("constants", CONSTANTS) | OPTIONS)]
    assert constants == changes.get("constants", CONSTANTS)


def test_other_options_and_other_kernels_have_other_answers(table, kernel):
    other = DemoKernel()
    for asked, options in ((kernel, {"num_warps": 4}), (kernel, {"num_warps": 8}), (other, {"num_warps": 4})):
        choose(asked, options=options)[1](1)
    assert [keywords["num_warps"] for _, _, keywords in kernel.launched] == [4, 8]
    assert len(other.launched) == 1


def test_what_the_caller_does_to_its_constants_later_changes_no_answer(table, kernel):
    mine = dict(CONSTANTS)
    _, launch = choose(kernel, constants=mine)
    mine["SHAPE"] = 9
    launch(1)
    assert kernel.launched[0][2]["SHAPE"] == 2


def test_a_binary_that_comes_later_is_launched(table, recorder, kernel):
    choose(kernel)[1](1, 0x10, 5)
    assert len(kernel.launched) == 1
    table.add([binary()], 0)
    recorder.take()
    choose(kernel)[1](1, 0x10, 5)
    assert len(kernel.launched) == 1
    assert any(line.startswith("launch") for line in recorder.take())
    # Of two that fit, the later: it was tuned for this machine, or comes with the artifact that was loaded last.
    table.add([binary(constants={"SHAPE": 2, "BLOCK_M": 128})], 0)
    assert choose(kernel)[0]["BLOCK_M"] == 128
    table.clear()
    assert choose(kernel)[0] == CONSTANTS
    choose(kernel)[1](1, 0x10, 5)
    assert len(kernel.launched) == 2


def test_a_binary_that_comes_while_the_answer_is_made_is_launched_next_time(table, kernel, monkeypatch):
    find = table.find

    def slow(*asked: Any, **tuned: Any) -> Any:
        answer = find(*asked, **tuned)
        loader = threading.Thread(target=table.add, args=([binary()], 0))
        loader.start()
        loader.join()
        return answer

    monkeypatch.setattr(table, "find", slow)
    choose(kernel)[1](1, 0x10, 5)
    assert len(kernel.launched) == 1
    choose(kernel)[1](1, 0x10, 5)
    assert len(kernel.launched) == 1


def test_loading_what_is_loaded_already_forgets_no_answer(table, kernel):
    table.add([binary()], 0)
    first = choose(kernel)
    table.add([binary()], 0)
    assert choose(kernel) is first


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a PyTorch that sees no GPU")
def test_tensors_elsewhere_need_no_device(kernel):
    with launcher.on_device(torch.ones(1)) as nothing:
        assert nothing is None


@pytest.mark.gpu
def test_the_current_device_is_set_and_given_back():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    with launcher.on_device(torch.ones(1, device="cuda:1")):
        assert torch.cuda.current_device() == 1
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_the_stream_is_the_current_one():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert launcher._raw_stream(0) == stream.cuda_stream
    assert launcher._raw_stream(0) == torch.cuda.current_stream().cuda_stream
