"""What tools/compare_kernels.py does without a GPU."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import ModuleType

import mla_decode
import pytest
from fake_timing import fake_measure
from mla_decode import native

from benchmarks.shapes import Shape
from tools import build, compare_kernels, side_by_side

SHAPE = Shape("one", (300, 70), 1, 16)


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A repository with one commit, whose only kernel source has been changed since."""
    root = tmp_path / "repository"
    for folder in compare_kernels.SOURCES:
        (root / folder).mkdir(parents=True)
        (root / folder / "file.h").write_text(f"{folder}, committed\n")
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b.example"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    (root / "megakernel" / "file.h").write_text("changed\n")
    monkeypatch.setattr(compare_kernels, "ROOT", root)
    monkeypatch.setattr(compare_kernels, "FOLDER", tmp_path / "compare")
    return root


@pytest.fixture
def original_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts back what the package launches, if anything."""
    monkeypatch.setattr(native, "_kernels", ModuleType("original"), raising=False)


def test_a_revision_is_what_was_committed(repository: Path) -> None:
    assert compare_kernels.sources_of(str(repository)) == repository
    committed = compare_kernels.sources_of("HEAD")
    assert committed.parent == compare_kernels.FOLDER
    for folder in compare_kernels.SOURCES:
        assert (committed / folder / "file.h").read_text() == f"{folder}, committed\n"


def test_what_is_no_version_is_named(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no-such-thing: expected a folder with megakernel/"):
        compare_kernels.sources_of("no-such-thing")
    assert compare_kernels.main(["no-such-thing"]) == 1
    assert "compare_kernels: no-such-thing: expected" in capsys.readouterr().err


def test_each_version_is_built_with_internals_of_its_own(
    monkeypatch: pytest.MonkeyPatch, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[Path, Path, str]] = []

    def build_kernels(root: Path, folder: Path, flags: str) -> Path:
        asked.append((root, folder, flags))
        return folder / "_kernels.so"

    monkeypatch.setattr(build, "build_kernels", build_kernels)
    versions = ["HEAD", str(repository), "HEAD", "elsewhere/_kernels.so"]
    assert compare_kernels.main(["--build-only", *versions]) == 0
    roots, folders, flags = zip(*asked, strict=True)
    assert roots == (roots[0], repository, roots[0])
    assert len(set(folders)) == len(set(flags)) == 3
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [*versions[:2], "HEAD #2", versions[3]]
    assert lines[3].endswith(str(Path.cwd() / "elsewhere" / "_kernels.so"))


def test_sources_elsewhere_are_built_with_their_own_headers(tmp_path: Path) -> None:
    bindings = tmp_path / "python" / "bindings"
    bindings.mkdir(parents=True)
    (bindings / "kernels.cu").touch()
    out = tmp_path / "out"
    toolkit = build.Toolkit(Path("nvcc"))
    text = build.ninja_text(out, out, toolkit, Path("kittens"), True, tmp_path, "-DOWN")
    (flags,) = (line for line in text.splitlines() if line.startswith("includes_nvcc = "))
    assert flags.startswith(f"includes_nvcc = -DOWN -I{tmp_path} ")
    assert f"nvcc {bindings / 'kernels.cu'}" in text
    assert str(build.ROOT / "instructions") not in text


def test_versions_are_timed_in_both_orders_each_with_its_kernels(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    original_kernels: None,
) -> None:
    versions = {name: ModuleType(name) for name in ("old", "new")}
    used: list[str] = []

    def mla_decode_by(plan: mla_decode.Plan, case: object) -> object:
        used.append(native._kernels.__name__)
        return by_plan(plan, case)

    by_plan = compare_kernels.mla_decode_by
    monkeypatch.setattr(compare_kernels, "mla_decode_by", mla_decode_by)
    monkeypatch.setattr(
        side_by_side, "measure", fake_measure({"old": 12.0, "new": 10.0}, in_turns=True)
    )
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    gains = compare_kernels.compare([SHAPE], versions, replays=4)
    assert used == ["old", "new", "new", "old"]
    assert gains["new"].ratios == [1.2]
    assert capsys.readouterr().out == "one: 12.0 us; new 1.200\n"


def test_an_error_is_asked_of_the_kernels_that_ran(
    monkeypatch: pytest.MonkeyPatch, original_kernels: None
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        compare_kernels,
        "mla_decode_by",
        lambda plan, case: compare_kernels.Prepared(
            lambda i: None, synchronize=lambda: asked.append(native._kernels.__name__)
        ),
    )
    first, second = (
        compare_kernels.prepare(ModuleType(name), None, None) for name in ("first", "second")
    )
    first.synchronize()
    second.synchronize()
    assert asked == ["first", "second"]


def test_a_module_that_cannot_be_loaded_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = tmp_path / "_kernels.so"
    module.write_text("no library")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert compare_kernels.main([str(module)]) == 1
    assert str(module) in capsys.readouterr().err


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert compare_kernels.main(["one.so", "other.so"]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err


def test_an_unknown_shape_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare_kernels.main(["one.so", "--shapes", "B3"])
    assert "unknown shapes ['B3']" in capsys.readouterr().err
