"""The C++ kernels, compiled once at first use into a private cache of the user, and loaded.

The package is installed without a compiler. The first call that could use the kernels compiles them; later processes find the result under
a key made of everything it depends on: the sources, the flags, the compiler, what the compiler knows of this processor, and the PyTorch
version. Where this fails, the plain path remains, and the reason is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "csrc"
_OLDEST_TORCH = "0x020a000000000000"  # 2.10, the first with all that the kernels use of the stable ABI
_COMPILE_TIMEOUT = 600  # seconds
_INSTRUCTION_SETS = {"__AVX512F__": "AVX-512", "__AVX2__": "AVX2", "__SSE2__": "SSE2", "__ARM_NEON": "NEON"}  # widest first


@dataclass(frozen=True, kw_only=True)
class Build:
    """What became of the kernels in this process.

    Attributes:
        reason: why there are none; empty when they are loaded.
        compiler: the command, empty when none was found.
        path: the shared library.
        seconds: what compiling took; 0 when the cache had it.
        instructions: the widest vector instructions that the compiler uses on this processor.
    """

    reason: str = ""
    compiler: str = ""
    path: str = ""
    seconds: float = 0.0
    instructions: str = ""


class _Unavailable(Exception):
    """Carries the reason."""


def build() -> Build:
    """Compile the kernels unless the cache has them, and load them into this process."""
    compiler = instructions = ""
    try:
        command = _compiler()
        compiler = shlex.join(command)
        macros = _macros(command)
        instructions = next((name for macro, name in _INSTRUCTION_SETS.items() if macro in macros), "")
        library = _private(_cache() / "equinorm") / f"kernels-{_key(command, macros)}.so"
        seconds = _compile_once(command, library)
        try:
            torch.ops.load_library(str(library))
        except OSError:
            if seconds > 0:
                raise
            library.unlink(missing_ok=True)  # damaged since it was compiled
            seconds = _compile_once(command, library)
            torch.ops.load_library(str(library))
    except (_Unavailable, OSError) as error:
        return Build(reason=str(error) or type(error).__name__, compiler=compiler, instructions=instructions)
    return Build(compiler=compiler, path=str(library), seconds=seconds, instructions=instructions)


def _compiler() -> list[str]:
    """The C++ compiler's command: ``$CXX`` if set, else the first of the usual names."""
    if os.name != "posix":
        raise _Unavailable(f"the kernels need GCC or Clang on Linux or macOS, this is {platform.system()}")
    wanted = shlex.split(os.environ.get("CXX", ""))
    for name, *options in [wanted] if wanted else [["c++"], ["g++"], ["clang++"]]:
        if path := shutil.which(name):
            return [path, *options]
    raise _Unavailable(
        f"$CXX names {wanted[0]!r}, which is not on the PATH"
        if wanted
        else "found no C++ compiler (c++, g++ or clang++) on the PATH; set $CXX or install one"
    )


def _target() -> str:
    """Compile for the processor at hand: the cache is never shared between machines of different kinds."""
    return "-march=native" if platform.machine().lower() in ("x86_64", "amd64", "i686") else "-mcpu=native"


def _macros(command: list[str]) -> str:
    """The compiler's predefined macros: its version and the instruction sets of this processor, in one text."""
    return _run([*command, _target(), "-dM", "-E", "-x", "c++", os.devnull])


def _flags() -> list[str]:
    package = Path(torch.__file__).parent
    system = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    return [
        "-std=c++20",
        "-O3",  # never -ffast-math: it would assume that NaN does not exist, and reorder sums
        _target(),
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        "-Wno-psabi",  # vectors as arguments: all callers are in here
        f"-DTORCH_TARGET_VERSION={_OLDEST_TORCH}",
        f"-I{package / 'include'}",
        f"-L{package / 'lib'}",
        "-ltorch_cpu",
        "-lc10",
        *system,
    ]


def _key(command: list[str], macros: str) -> str:
    parts = [shlex.join(command), macros, torch.__version__, *_flags()]
    parts += [f"{file.name}\n{file.read_text()}" for file in sorted(SOURCES.iterdir())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _cache() -> Path:
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):
        return Path(given)
    try:
        return Path.home() / ".cache"
    except RuntimeError as error:  # no home folder known
        raise _Unavailable(f"no place for the compiled kernels: {error}; set $XDG_CACHE_HOME") from error


def _private(folder: Path) -> Path:
    """``folder``, created for this user alone. Whoever can write there can run code in this process."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        place = folder.lstat()
    except OSError as error:
        raise _Unavailable(f"the cache folder {folder} cannot be used: {error.strerror}; set $XDG_CACHE_HOME to one that can") from error
    if not stat.S_ISDIR(place.st_mode):
        raise _Unavailable(f"the cache {folder} must be a folder of its own, not a link or file")
    if place.st_uid != os.geteuid():
        raise _Unavailable(
            f"the cache folder {folder} belongs to another user (uid {place.st_uid}); set $XDG_CACHE_HOME to a folder of yours"
        )
    if place.st_mode & 0o022:
        raise _Unavailable(f"the cache folder {folder} is writable by others; run `chmod go-w {shlex.quote(str(folder))}`")
    for parent in folder.resolve().parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise _Unavailable(f"{parent}, which holds the cache folder {folder}, is writable by everyone; set $XDG_CACHE_HOME elsewhere")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _Unavailable(f"the cache folder {folder} is not writable")
    return folder


def _sound(library: Path) -> bool:
    """Whether the library is there, a file of this user that nobody else can write."""
    try:
        file = library.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(file.st_mode) and file.st_uid == os.geteuid() and not file.st_mode & 0o022


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time. The system releases the lock of a process that dies."""
    import fcntl

    with open(path, "w") as file:
        # Where the file system knows no locks, several may compile: the renaming below keeps the result whole.
        with contextlib.suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _compile_once(command: list[str], library: Path) -> float:
    """Compile unless the library is there, and return how many seconds that took."""
    if _sound(library):
        return 0.0
    with _locked(library.with_suffix(".lock")):
        return 0.0 if _sound(library) else _compile(command, library)  # another process may have been first


def _compile(command: list[str], library: Path) -> float:
    sources = sorted(str(file) for file in SOURCES.glob("*.cpp"))
    print(f"equinorm: compiling its CPU kernels, once for this machine (some 10 s), into {library.parent}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    handle, unfinished = tempfile.mkstemp(suffix=".so", prefix=f"{library.stem}-", dir=library.parent)
    os.close(handle)
    try:
        with tempfile.TemporaryDirectory(dir=library.parent) as folder, ThreadPoolExecutor() as pool:
            objects = [os.path.join(folder, f"{Path(source).stem}.o") for source in sources]
            list(pool.map(lambda source, made: _run([*command, "-c", source, *_flags(), "-o", made]), sources, objects))
            _run([*command, *objects, *_flags(), "-o", unfinished])  # the libraries come after the objects that use them
        os.chmod(unfinished, 0o700)
        os.replace(unfinished, library)  # whole or not at all
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unfinished)
    return time.perf_counter() - start


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_COMPILE_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise _Unavailable(f"{command[0]} did not finish within {_COMPILE_TIMEOUT} s") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
        raise _Unavailable(f"{command[0]} failed with exit code {done.returncode}: {lines[0].strip()}")
    return done.stdout


_once = threading.Lock()
_result: Build | None = None


def result() -> Build:
    """What :func:`build` returned; it runs once per process."""
    global _result
    if _result is None:
        with _once:
            if _result is None:
                _result = build()
    return _result
