"""How the kernels come to be: compiled once, kept where nobody else can write, and what is said when that is not possible."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from equinorm.kernels import build

# Reports what became of the kernels, after asking twice. The sources are replaced by a small one: the real ones are compiled for the
# other tests anyway.
REPORT = """
import json, os, sys
from pathlib import Path
from equinorm.kernels import build, cpu
build.SOURCES = Path(os.environ["TEST_SOURCES"])
print(json.dumps({"available": [cpu.available(), cpu.available()], **cpu.info()}))
"""


def start(cache: Path, **environment: str) -> subprocess.Popen[str]:
    """A fresh process that prints REPORT as JSON."""
    sources = cache.parent / "sources"
    sources.mkdir(exist_ok=True)
    (sources / "small.cpp").write_text('extern "C" int equinorm_answer() { return 42; }')
    variables = {**os.environ, "XDG_CACHE_HOME": str(cache), "TEST_SOURCES": str(sources), "PYTHONWARNINGS": "default", **environment}
    return subprocess.Popen([sys.executable, "-c", REPORT], env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out), err


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def counted(tmp_path: Path) -> tuple[dict[str, str], Path]:
    """A compiler that writes each command to a file, and takes its time."""
    real, calls = build._compiler()[0], tmp_path / "calls"
    return {"CXX": script(tmp_path / "c++", f'echo "$@" >> {calls}\nsleep 1\nexec {real} "$@"')}, calls


def compilations(calls: Path) -> int:
    """How often a library was linked; each of its sources is compiled before."""
    return sum("-shared" in line and "-c" not in line.split() for line in calls.read_text().splitlines())


needs_compiler = pytest.mark.skipif(bool(build.result().reason), reason=f"no CPU kernels here: {build.result().reason}")


@needs_compiler
def test_processes_that_start_together_compile_once(tmp_path: Path, counted: tuple[dict[str, str], Path]) -> None:
    environment, calls = counted
    cache = tmp_path / "cache"
    results = [finish(process) for process in [start(cache, **environment) for _ in range(3)]]
    assert compilations(calls) == 1
    assert [found["state"] for found, _ in results] == ["ready"] * 3
    assert all(found["available"] == [True, True] for found, _ in results)
    assert sum(found["seconds"] > 0 for found, _ in results) == 1
    assert sum("compiling its CPU kernels" in err for _, err in results) == 1
    folder = cache / "equinorm"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert sorted(file.suffix for file in folder.iterdir()) == [".lock", ".so"]

    later, err = finish(start(cache, **environment))
    assert (later["state"], later["seconds"], err) == ("ready", 0.0, "")
    assert compilations(calls) == 1

    Path(later["path"]).write_bytes(b"not a library")
    repaired, _ = finish(start(cache, **environment))
    assert repaired["state"] == "ready"
    assert compilations(calls) == 2


def test_without_a_compiler_the_reason_is_said_once(tmp_path: Path) -> None:
    found, err = finish(start(tmp_path / "cache", PATH="", CXX=""))
    assert found["state"] == "unavailable"
    assert found["available"] == [False, False]
    assert found["reason"] == "found no C++ compiler (c++, g++ or clang++) on the PATH; set $CXX or install one"
    assert err.count("RuntimeWarning: equinorm runs without its CPU kernels") == 1
    assert found["reason"] in err


@pytest.fixture
def in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of builds in this process, which never get as far as loading a library."""
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache


def test_a_compiler_that_is_not_there_is_named(in_process: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    assert build.build().reason == "$CXX names 'no-such-compiler', which is not on the PATH"


@needs_compiler
def test_a_source_that_does_not_compile_is_reported_and_leaves_nothing(
    in_process: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "broken.cpp").write_text("int answer() { return fourty_two; }\n")
    monkeypatch.setattr(build, "SOURCES", sources)
    found = build.build()
    assert "failed with exit code 1" in found.reason
    assert "broken.cpp:1" in found.reason
    assert "fourty_two" in found.reason
    assert found.path == ""
    assert [file.suffix for file in (in_process / "equinorm").iterdir()] == [".lock"]


@needs_compiler
def test_a_cache_that_others_can_write_is_refused(in_process: Path) -> None:
    folder = in_process / "equinorm"
    folder.mkdir()
    for mode in (0o777, 0o770, 0o722):
        folder.chmod(mode)
        assert build.build().reason == f"the cache folder {folder} is writable by others; run `chmod go-w {folder}`"
    folder.chmod(0o700)
    in_process.chmod(0o777)
    assert build.build().reason.startswith(f"{in_process}, which holds the cache folder {folder}, is writable by everyone")
    in_process.chmod(0o755)


@needs_compiler
def test_a_cache_that_is_a_link_or_a_file_is_refused(in_process: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder = in_process / "equinorm"
    folder.symlink_to(elsewhere)
    assert build.build().reason == f"the cache {folder} must be a folder of its own, not a link or file"
    folder.unlink()
    folder.write_text("")
    assert "cannot be used: File exists; set $XDG_CACHE_HOME" in build.build().reason


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a folder away")
def test_a_cache_of_another_user_is_refused(in_process: Path) -> None:
    folder = in_process / "equinorm"
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, -1)
    assert "belongs to another user (uid 12345)" in build.build().reason


@needs_compiler
def test_a_library_that_others_can_write_is_not_loaded(tmp_path: Path) -> None:
    library = tmp_path / "kernels.so"
    library.write_bytes(b"")
    library.chmod(0o700)
    assert build._sound(library)
    library.chmod(0o722)
    assert not build._sound(library)


def test_the_key_names_all_that_the_library_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "csrc"
    sources.mkdir()
    header = sources / "lanes.h"
    header.write_text("// one")
    monkeypatch.setattr(build, "SOURCES", sources)
    first = build._key(["c++"], "#define __VERSION__ 1")
    assert first == build._key(["c++"], "#define __VERSION__ 1")
    keys = {first, build._key(["c++", "-g"], "#define __VERSION__ 1"), build._key(["c++"], "#define __VERSION__ 2")}
    header.write_text("// two")
    keys.add(build._key(["c++"], "#define __VERSION__ 1"))
    monkeypatch.setattr("torch.__version__", "2.99")
    keys.add(build._key(["c++"], "#define __VERSION__ 1"))
    assert len(keys) == 5


def test_the_lock_of_a_killed_process_does_not_bind(tmp_path: Path) -> None:
    take = f"""
import sys, time
from pathlib import Path
from equinorm.kernels import build
Path(sys.argv[1] + " ready").touch()
with build._locked(Path({str(tmp_path / "kernels.lock")!r})):
    Path(sys.argv[1] + " mine").touch()
    time.sleep(float(sys.argv[2]))
"""

    def process(name: str, seconds: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", take, str(tmp_path / name), str(seconds)])

    def wait_for(name: str) -> None:
        end = time.monotonic() + 60
        while not (tmp_path / name).exists():
            assert time.monotonic() < end, f"no {name} after a minute"
            time.sleep(0.01)

    with process("holder", 600) as holder:
        try:
            wait_for("holder mine")
            with process("waiter", 0) as waiter:
                wait_for("waiter ready")
                time.sleep(0.5)
                assert not (tmp_path / "waiter mine").exists()
                holder.kill()
                assert waiter.wait(60) == 0
                assert (tmp_path / "waiter mine").exists()
        finally:
            holder.kill()
