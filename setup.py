"""Builds ``esper._native`` with CMake and ninja, and maps ``kernels/`` to ``esper.kernels``.

Environment:
    ESPER_CUDA: unset or ``auto`` builds the CUDA kernels if it can and says why if it cannot, ``1`` insists on them,
        ``0`` leaves them out.
    ESPER_CUDA_ARCHS: compute capabilities, all of which ``ESPER_CUDA=1`` then insists on; if unset, those of
        ``80;90;100`` that nvcc knows. PTX of the last one goes in as well.
    CUDACXX, CUDA_HOME, CUDA_PATH: where nvcc is, asked in this order before ``PATH`` and ``/usr/local/cuda``.
    CXX: the C++ compiler. Without any the package installs and runs on its other backends, unless ``ESPER_CUDA=1``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, ExecError, OptionError

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "80;90;100"
#: The oldest toolkit whose nvcc takes C++17 and knows sm_90.
MIN_NVCC = (12, 0)


@dataclass(frozen=True)
class CudaChoice:
    """Whether CUDA is built, for what, and if not, why not."""

    nvcc: str = ""
    archs: str = ""
    reason: str = ""
    required: bool = False


def say(message: str) -> None:
    """One line in the build log (pip shows it with ``-v``, and always when the build fails)."""
    print(f"esper: {message}", flush=True)


def find_cxx(environ: Mapping[str, str]) -> str:
    """A C++ compiler, or "" if there is none; CMake finds the same one."""
    wanted = [environ["CXX"].split()[0]] if environ.get("CXX", "").strip() else ["c++", "g++", "clang++"]
    return next(filter(None, (shutil.which(name, path=environ.get("PATH", "")) for name in wanted)), "")


def find_nvcc(environ: Mapping[str, str]) -> str:
    """The nvcc to use, or "" if there is none."""
    if "CUDACXX" in environ:
        return shutil.which(environ["CUDACXX"], path=environ.get("PATH", "")) or ""
    homes = [environ[key] for key in ("CUDA_HOME", "CUDA_PATH") if environ.get(key)]
    folders = [*(os.path.join(home, "bin") for home in homes), environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(folders)) or ""


def nvcc_version(nvcc: str) -> tuple[int, int] | None:
    """``(major, minor)`` of a CUDA compiler, or None if it does not run."""
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"release (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def nvcc_archs(nvcc: str) -> set[str]:
    """Compute capabilities the compiler can build, such as ``{"80", "90"}``."""
    text = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, timeout=60).stdout
    return set(re.findall(r"compute_(\d+)", text))


def choose_cuda(environ: Mapping[str, str]) -> CudaChoice:
    """Decide about CUDA from the environment and the tools found.

    Raises:
        OptionError: ``ESPER_CUDA`` or ``ESPER_CUDA_ARCHS`` makes no sense, or ``ESPER_CUDA=1`` cannot be had.
    """
    mode = environ.get("ESPER_CUDA", "").strip().lower() or "auto"
    if mode not in ("auto", "0", "1"):
        raise OptionError(f"ESPER_CUDA={mode}: expected 1 (required), 0 (leave out) or auto (if possible)")
    if mode == "0":
        return CudaChoice(reason="ESPER_CUDA=0 at build time")
    required = mode == "1"
    named = environ.get("ESPER_CUDA_ARCHS", "").strip()
    wanted = [arch.strip() for arch in re.split(r"[;,\s]+", named or DEFAULT_ARCHS) if arch]
    if bad := [arch for arch in wanted if not re.fullmatch(r"\d{2,3}[af]?", arch)]:
        raise OptionError(f"ESPER_CUDA_ARCHS: {bad[0]!r} is no compute capability; write them like {DEFAULT_ARCHS}")

    def without(reason: str) -> CudaChoice:
        if required:
            raise OptionError(f"ESPER_CUDA=1 asks for the CUDA kernels, but {reason}")
        return CudaChoice(reason=reason)

    need = ".".join(map(str, MIN_NVCC))
    nvcc = find_nvcc(environ)
    if not nvcc:
        return without(f"nvcc was not found (CUDA {need} or newer is needed; CUDA_HOME or CUDACXX says where it is)")
    version = nvcc_version(nvcc)
    if version is None:
        return without(f"{nvcc} --version gave no version; is it a working CUDA compiler?")
    found = ".".join(map(str, version))
    if version < MIN_NVCC:
        return without(f"{nvcc} is version {found}, and {need} or newer is needed")
    can = nvcc_archs(nvcc)
    unknown = [arch for arch in wanted if arch.rstrip("af") not in can]
    known = [arch for arch in wanted if arch not in unknown]
    # Nobody asked for the last of the default ones: nvcc 12.0 knows two of three, and is new enough.
    if unknown and ((required and named) or not known):
        return without(f"{nvcc} {found} cannot build for {', '.join(unknown)}; change ESPER_CUDA_ARCHS")
    if unknown:
        say(f"nvcc {found} cannot build for {', '.join(unknown)}: left out")
    # CMake: "-real" is machine code only; a bare number is machine code and PTX.
    archs = ";".join([*(f"{arch}-real" for arch in known[:-1]), known[-1]])
    say(f"CUDA kernels with {nvcc} {found} for {archs}")
    return CudaChoice(nvcc=nvcc, archs=archs, required=required)


def probe_nvcc(nvcc: str, environ: Mapping[str, str]) -> None:
    """Compile next to nothing: an nvcc that rejects this machine's C++ compiler says so better than CMake would.

    Raises:
        CompileError: with nvcc's own words.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cu"
        source.write_text("#include <cstdint>\n__global__ void probe(std::uint8_t* x) { *x = 1; }\n")
        host = ["-ccbin", environ["CUDAHOSTCXX"]] if environ.get("CUDAHOSTCXX") else []
        command = [nvcc, "-std=c++17", *host, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=dict(environ), check=False)
    if result.returncode:
        words = [line for line in (result.stderr + result.stdout).splitlines() if line.strip()] or ["no message"]
        raise CompileError(f"{nvcc} does not work with this machine's C++ compiler: {' '.join(words[:3])}")


class BuildNative(build_ext):
    """Hands the one extension over to CMake."""

    def build_extension(self, ext: Extension) -> None:
        """Configure and compile, and put the result where setuptools expects it."""
        cuda = choose_cuda(os.environ)
        if not find_cxx(os.environ):
            if cuda.required:
                raise ExecError("ESPER_CUDA=1 asks for the CUDA kernels, but there is no C++ compiler (CXX names one)")
            say("without esper._native: no C++ compiler was found (CXX names one); Esper runs on its other backends")
            return
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # One tree for every way to build (editable, in place, wheel): a second build compiles only what changed.
        work = ROOT / "build" / "native"
        with exclusive(ROOT / "build" / "native.lock"):
            try:
                built = self._compile(work, cuda)
            except CompileError as error:
                if not cuda.archs or cuda.required:
                    raise
                built = self._compile(work, CudaChoice(reason=f"{error} (with ESPER_CUDA=1 this would be an error)"))
            replace_file(built, target)

    def copy_extensions_to_source(self) -> None:
        """In place, without ever truncating a file that a running process has mapped."""
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            inplace, regular = self._get_inplace_equivalent(build_py, ext)
            if Path(regular).is_file():
                replace_file(Path(regular), Path(inplace))

    def _compile(self, work: Path, cuda: CudaChoice) -> Path:
        if cuda.reason:
            say(f"without CUDA kernels: {cuda.reason}")
        cmake, ninja = tool("cmake"), tool("ninja")
        import pybind11

        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            # The base interpreter: its name does not depend on how an environment calls it.
            "Python_EXECUTABLE": os.path.realpath(sys.executable),
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "ESPER_CUDA_ARCHS": cuda.archs,
            "ESPER_CUDA_REASON": cuda.reason,
        }
        # The compiler and the tools are fixed in a CMake tree at its first run; another set of them needs a fresh tree.
        stamp = "\n".join([cmake, cuda.nvcc, *(f"{key}={value}" for key, value in settings.items())])
        stamp_file = work / "settings.txt"
        if not stamp_file.is_file() or stamp_file.read_text() != stamp:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            environ = dict(os.environ)
            if cuda.nvcc:
                probe_nvcc(cuda.nvcc, environ)
                environ["CUDACXX"] = cuda.nvcc
            defines = [f"-D{key}={value}" for key, value in settings.items()]
            run([cmake, "-S", str(ROOT), "-B", str(work), "-G", "Ninja", *defines], environ)
            stamp_file.write_text(stamp)
        run([cmake, "--build", str(work)], dict(os.environ))
        built = work / self.get_ext_filename("_native")
        if not built.is_file():
            raise CompileError(f"CMake finished, but {built} is not there")
        return built


def tool(name: str) -> str:
    """Path of a build tool: beside this Python (an isolated build's own) before ``PATH``."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    if not found:
        raise ExecError(f"{name} was not found; `pip install {name}` provides it")
    return found


def run(command: list[str], environ: dict[str, str]) -> None:
    """Run a build step; its own output is the error message."""
    try:
        subprocess.run(command, env=environ, check=True)
    except subprocess.CalledProcessError:
        step = "compile" if "--build" in command else "configure"
        raise CompileError(f"could not {step} esper._native; the messages are in the build log") from None


@contextlib.contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Keep a second build of this checkout waiting until the first is done."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def replace_file(source: Path, target: Path) -> None:
    """Copy, then rename over ``target`` in one step."""
    if source.resolve() == target.resolve():
        return
    fresh = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    shutil.copy2(source, fresh)
    os.replace(fresh, target)


def packages() -> list[str]:
    """Every package under ``esper/``, and ``kernels/`` under its installed name.

    A checkout has the symbolic link ``esper/kernels`` for tools that read folders; it must not count twice.
    """
    own = find_packages(str(ROOT), include=["esper", "esper.*"], exclude=["esper.kernels", "esper.kernels.*"])
    inner = find_packages(str(ROOT / "kernels"))
    return [*own, "esper.kernels", *(f"esper.kernels.{name}" for name in inner)]


if __name__ == "__main__":
    setup(
        packages=packages(),
        package_dir={"esper": "esper", "esper.kernels": "kernels"},
        package_data={"esper": ["py.typed"]},
        ext_modules=[Extension("esper._native", sources=[])],
        cmdclass={"build_ext": BuildNative},
        zip_safe=False,
    )
