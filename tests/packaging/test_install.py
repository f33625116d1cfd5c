"""Esper installs the way users install it, and says what it could not build."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.packaging.conftest import Environment, clean_environment

pytestmark = pytest.mark.packaging

#: What every Linux has. No libcudart (linked in), no libtorch (not used while building).
SYSTEM_LIBRARIES = {"libstdc++", "libgcc_s", "libm", "libc", "librt", "libpthread", "libdl", "ld-linux-x86-64"}

#: Wraps, wakes a seed, trains one step.
GROW = """
import asyncio, sys, torch, esper
network = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU())
model = esper.wrap(network, registry=sys.argv[1])
kernel = esper.compile("lowrank", d_in=8, d_out=8, registry=sys.argv[1])
assert asyncio.run(model.load_kernel("0", 1, kernel))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(torch.randn(4, 8)).square().mean().backward()
optimizer.step()
model.step()
assert model.get_model_stats()["active_seeds"] == 1
model.close()
print("grown")
"""


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(out), str(tree)]
    result = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (archive,) = out.glob("esper-*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def from_sdist(sdist: Path, new_environment: Callable[[], Environment]) -> Environment:
    """Installed from the sdist, with whatever compilers this machine has."""
    environment = new_environment()
    result = environment.install(sdist)
    assert result.returncode == 0, result.stdout + result.stderr
    # The log says what was decided about CUDA.
    log = result.stdout + result.stderr
    assert "esper: CUDA kernels with" in log or "esper: without CUDA kernels: " in log
    return environment


@pytest.fixture(scope="module")
def without_cuda(tree: Path, new_environment: Callable[[], Environment]) -> Environment:
    """Installed from a clone with ``ESPER_CUDA=0``."""
    environment = new_environment()
    result = environment.install(tree, ESPER_CUDA="0")
    assert result.returncode == 0, result.stdout + result.stderr
    return environment


def describe(environment: Environment, **environ: str) -> dict[str, object]:
    result = environment.run("-m", "esper.cli.main", "env", "--json", **environ)
    assert result.returncode == 0, result.stderr
    description: dict[str, object] = json.loads(result.stdout)
    return description


def test_sdist_holds_the_sources_and_nothing_built(sdist: Path, tree: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder, pattern in [("csrc", "*"), ("kernels", "*.py"), ("esper", "*.py"), ("tests", "*.py"), ("docs", "*.md")]:
        present = {str(path.relative_to(tree)) for path in (tree / folder).rglob(pattern) if path.is_file()}
        # The link is for tools in a checkout; the package's files come from kernels/.
        present = {name for name in present if not name.startswith("esper/kernels/")}
        assert present
        assert present <= names
    assert {"setup.py", "CMakeLists.txt", "LICENSE", "README.md", "Makefile", ".ci/run"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", ".o")) or name.startswith("esper/kernels")]


def test_sdist_install_works(from_sdist: Environment) -> None:
    description = describe(from_sdist)
    assert description["location"] == str(from_sdist.packages / "esper")
    assert description["native"]["loaded"]  # type: ignore[index]
    assert {operation["name"] for operation in description["operations"]}  # type: ignore[attr-defined]
    result = from_sdist.run("-W", "error", "-c", "import esper.kernels, esper.ops; print(esper.kernels.__file__)")
    assert result.stdout.strip() == str(from_sdist.packages / "esper" / "kernels" / "__init__.py"), result.stderr


def test_console_script(from_sdist: Environment) -> None:
    result = subprocess.run(
        [from_sdist.folder / "bin" / "esper", "--version"], env=clean_environment(), capture_output=True, text=True
    )
    assert (result.returncode, result.stdout.split()[0]) == (0, "esper"), result.stderr


def test_extension_stands_alone(from_sdist: Environment) -> None:
    (library,) = (from_sdist.packages / "esper").glob("_native*.so")
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    names = {line.split("[")[1].split(".so")[0] for line in needed.splitlines() if "(NEEDED)" in line}
    assert names <= SYSTEM_LIBRARIES
    # Hidden visibility: no symbol of ours, or of the CUDA runtime inside, can meet another library's.
    symbols = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    strong = {line.split()[2] for line in symbols.splitlines() if line.split()[1] in "TDBR"}
    assert strong == {"PyInit__native"}


def test_clone_install_without_cuda(without_cuda: Environment) -> None:
    native = describe(without_cuda)["native"]
    assert native["loaded"]  # type: ignore[index]
    assert native["cuda"] is False  # type: ignore[index]
    assert native["cuda_reason"] == "esper._native was built without CUDA: ESPER_CUDA=0 at build time"  # type: ignore[index]


def test_without_the_extension_it_works_and_says_so_once(without_cuda: Environment, tmp_path: Path) -> None:
    (library,) = (without_cuda.packages / "esper").glob("_native*.so")
    hidden = library.rename(library.with_name("hidden"))
    try:
        description = describe(without_cuda)
        result = without_cuda.run("-c", GROW, str(tmp_path / "registry"), ESPER_CACHE_DIR=str(tmp_path / "cache"))
        for_another = library.with_name("_native.cpython-27-x86_64-linux-gnu.so")
        hidden.rename(for_another)
        other = without_cuda.run("-c", "import esper.ops.native as n; print(n.reason())")
        for_another.rename(hidden)
    finally:
        hidden.rename(library)
    assert "was not built" in description["native"]["reason"]  # type: ignore[index]
    for operation in description["operations"]:  # type: ignore[attr-defined]
        # Operations without native code for the CPU: the snapshot is one tensor copy on every backend, layers run their
        # bank without an operation, and the others are PyTorch's own operations one after the other.
        without = ("lattice_snapshot", "graft_bank", "graft_alpha", "graft_elementwise", "fused_linear")
        if operation["name"].removesuffix("_backward") not in without:
            assert operation["devices"]["cpu"]["used"] == "reference"
            assert "was not built" in operation["devices"]["cpu"]["rejected"]["cpu"]
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "grown"
    assert result.stderr.count("RuntimeWarning") == 1
    assert "esper._native was not built" in result.stderr
    assert "built for another Python (_native.cpython-27" in other.stdout


def test_broken_extension_is_reported_not_fatal(without_cuda: Environment) -> None:
    (library,) = (without_cuda.packages / "esper").glob("_native*.so")
    hidden = library.rename(library.with_name("hidden"))
    try:
        library.write_bytes(b"not a library")
        native = describe(without_cuda)["native"]
    finally:
        hidden.rename(library)
    assert "does not load" in native["reason"]  # type: ignore[index]


def test_required_cuda_without_nvcc_is_a_clear_error(tree: Path, new_environment: Callable[[], Environment]) -> None:
    result = new_environment().install(tree, ESPER_CUDA="1", CUDACXX="/nowhere/nvcc")
    assert result.returncode != 0
    log = result.stdout + result.stderr
    assert "ESPER_CUDA=1 asks for the CUDA kernels, but nvcc was not found (CUDA 12.0 or newer is needed" in log
    assert "Traceback" not in log


@pytest.fixture
def tiny_tree(tree: Path, tmp_path: Path) -> Path:
    """The build's own files around an extension that does nothing: for the build's decisions, which must not wait."""
    tiny = tmp_path / "tiny"
    shutil.copytree(tree, tiny, symlinks=True, ignore=shutil.ignore_patterns("*.cpp", "*.cu", "build", "tests", "docs"))
    (tiny / "csrc" / "module.cpp").write_text(
        '#include <pybind11/pybind11.h>\n#include "build_config.h"\n'
        'PYBIND11_MODULE(_native, m) { m.attr("cuda_reason") = ESPER_CUDA_REASON; }\n'
    )
    return tiny


def build_in_place(tree: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=tree, env=clean_environment(**environ), capture_output=True, text=True)


def recorded_reason(tree: Path) -> str:
    (library,) = (tree / "esper").glob("_native*.so")
    script = (
        "import importlib.util as u, sys; s = u.spec_from_file_location('_native', sys.argv[1]); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.cuda_reason)"
    )
    return subprocess.run(
        [sys.executable, "-c", script, str(library)], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_an_nvcc_that_rejects_the_host_compiler(tiny_tree: Path, tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        "[ $1 = --version ] && echo 'release 13.0,' && exit\n"
        "[ $1 = --list-gpu-arch ] && echo 'compute_80 compute_90 compute_100' && exit\n"
        "echo 'error: unsupported GNU version' >&2; exit 1\n"
    )
    nvcc.chmod(0o755)
    expected = "does not work with this machine's C++ compiler: error: unsupported GNU version"
    required = build_in_place(tiny_tree, CUDACXX=str(nvcc), ESPER_CUDA="1")
    assert required.returncode != 0
    assert expected in required.stderr
    assert not list((tiny_tree / "esper").glob("_native*.so"))
    best_effort = build_in_place(tiny_tree, CUDACXX=str(nvcc))
    assert best_effort.returncode == 0, best_effort.stdout + best_effort.stderr
    assert expected in best_effort.stdout
    assert expected in recorded_reason(tiny_tree)


def test_without_nvcc_the_reason_is_kept_and_a_compile_error_keeps_the_old_extension(tiny_tree: Path) -> None:
    without_nvcc = {"CUDACXX": "/nowhere/nvcc"}
    result = build_in_place(tiny_tree, **without_nvcc)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "esper: without CUDA kernels: nvcc was not found" in result.stdout
    assert recorded_reason(tiny_tree).startswith("nvcc was not found")

    (tiny_tree / "csrc" / "broken.cpp").write_text("int broken() { return nothing; }\n")
    result = build_in_place(tiny_tree, **without_nvcc)
    assert result.returncode != 0
    assert re.search(r"broken\.cpp:1:23: error: .*nothing.* was not declared", result.stdout)
    assert "error: could not compile esper._native" in result.stderr
    assert "Traceback" not in result.stderr
    assert recorded_reason(tiny_tree).startswith("nvcc was not found")


def test_without_a_cxx_compiler_it_installs_without_the_extension(tiny_tree: Path) -> None:
    result = build_in_place(tiny_tree, CXX="/nowhere/c++", ESPER_CUDA="0")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "without esper._native: no C++ compiler was found" in result.stdout
    assert not list((tiny_tree / "esper").glob("_native*.so"))
