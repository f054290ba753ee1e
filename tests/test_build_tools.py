"""The build and benchmark tools themselves."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench, case, shapes
from benchmarks.measure import Row
from tools import (
    build,
    environment,
    fetch_thunderkittens,
    gpu_check,
    ptxas_report,
    results,
    source_digest,
)

ROOT = Path(__file__).resolve().parent.parent

CLEAN_REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4copyPf' for 'sm_90a'
ptxas info    : Function properties for _Z4copyPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 1 barriers, 2048 bytes smem
"""
SPILLING_REPORT = (
    CLEAN_REPORT
    + """\
ptxas info    : Compiling entry function '_Z6mergedPfi' for 'sm_90a'
ptxas info    : Function properties for _Z6mergedPfi
    1712 bytes stack frame, 2460 bytes spill stores, 2464 bytes spill loads
ptxas info    : Used 168 registers, used 0 barriers, 1712 bytes cumulative stack size
"""
)

# name: (sum of lengths, batch, new tokens, heads, MB of cache, floor in us)
PUBLISHED = {
    "B1_64k_q1_h16": (65536, 1, 1, 16, 75.5, 18.5),
    "imb4_q4_h16": (53185, 4, 4, 16, 61.3, 15.4),
    "B64_mix_q4_h16": (41550, 64, 4, 16, 47.9, 14.4),
    "B64_512_q2_h16": (32768, 64, 2, 16, 37.7, 11.2),
    "B8_1k_q1_h16": (8192, 8, 1, 16, 9.4, 3.8),
    "B16_lognormal_q1_h16": (95680, 16, 1, 16, 110.2, 25.6),
    "B132_4k_q4_h16": (540672, 132, 4, 16, 622.9, 141),
    "B128_4k_q1_h16": (524288, 128, 1, 16, 604.0, 134),
    "B128_4k_q1_h8": (524288, 128, 1, 8, 604.0, 133),
    "B32_8k_q1_h64": (262144, 32, 1, 64, 302.0, 68),
    "B128_4k_q1_h128": (524288, 128, 1, 128, 604.0, 185),
    "B128_8k_q2_h128": (1048576, 128, 2, 128, 1208.0, 739),
    "B1_128k_q1_h128": (131072, 1, 1, 128, 151.0, 46),
}


def test_ptxas_report_is_read_per_function() -> None:
    copy, merged = ptxas_report.parse(SPILLING_REPORT)
    assert (copy.name, copy.is_kernel, copy.registers, copy.smem_bytes) == (
        "_Z4copyPf",
        True,
        24,
        2048,
    )
    assert not copy.spills
    assert (merged.registers, merged.spill_store_bytes, merged.spill_load_bytes) == (
        168,
        2460,
        2464,
    )
    assert merged.spills


@pytest.mark.parametrize(
    ("report", "flags", "status"),
    [(CLEAN_REPORT, [], 0), (SPILLING_REPORT, [], 1), (SPILLING_REPORT, ["--allow-spills"], 0)],
    ids=["clean", "spill", "spill allowed"],
)
def test_a_spill_fails_the_build(
    report: str, flags: list[str], status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, out = tmp_path / "kernels.log", tmp_path / "ptxas.txt"
    log.write_text(report)
    assert ptxas_report.main([*flags, "--out", str(out), str(log)]) == status
    assert out.exists() == (status == 0)
    assert ("SPILLS 2460 B stored" in capsys.readouterr().out) == (report == SPILLING_REPORT)


def test_a_report_without_functions_fails(tmp_path: Path) -> None:
    log = tmp_path / "kernels.log"
    log.write_text("")
    assert ptxas_report.main(["--out", str(tmp_path / "ptxas.txt"), str(log)]) == 1


def test_a_ptxas_warning_is_reported_once() -> None:
    line = (
        "ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to insufficient register resources for the function '_Z{}'\n"
    )
    assert ptxas_report.warnings(CLEAN_REPORT + line.format("4copyPf") + line.format("5merge")) == [
        "(C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
        "insufficient register resources"
    ]


def test_modules_link_neither_torch_nor_python_nor_the_driver() -> None:
    readelf = shutil.which("readelf")
    modules = list(build.PACKAGE.glob("_*.so"))
    if readelf is None or not modules:
        pytest.skip("no readelf" if modules else "nothing is built")
    for module in modules:
        text = subprocess.check_output([readelf, "-d", str(module)], text=True)
        needed = re.findall(r"NEEDED.*\[(.*)\]", text)
        wrong = [name for name in needed if re.match(r"lib(torch|c10|python|cuda|cudart)\b", name)]
        assert wrong == [], module.name


def test_build_without_nvcc_leaves_the_kernels_out(tmp_path: Path) -> None:
    text = build.ninja_text(tmp_path, tmp_path, None, None, False)
    assert "_scheduler" in text
    assert "_kernels" not in text


def test_cuda_home_without_nvcc_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(build.BuildError, match="CUDA_HOME"):
        build.find_nvcc()


def test_thunderkittens_root_is_honoured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("THUNDERKITTENS_ROOT", str(tmp_path))
    with pytest.raises(fetch_thunderkittens.FetchError, match=re.escape("kittens.cuh")):
        fetch_thunderkittens.include_folder()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "kittens.cuh").touch()
    assert fetch_thunderkittens.include_folder() == tmp_path / "include"


def test_an_archive_with_another_hash_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    archive = tmp_path / fetch_thunderkittens.ARCHIVE
    (tmp_path / "kittens.cuh").touch()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "kittens.cuh", f"{fetch_thunderkittens.PREFIX}include/kittens.cuh")
    monkeypatch.setattr(fetch_thunderkittens, "THIRD_PARTY", tmp_path / "third_party" / "tk")
    with pytest.raises(fetch_thunderkittens.FetchError, match="expected sha256"):
        fetch_thunderkittens.unpack(archive)
    assert not (tmp_path / "third_party").exists()


def test_every_installed_version_is_pinned() -> None:
    for group in ("torch", "build", "thunderkittens", "nvcc", "run", "test", "lint", "peers"):
        for requirement in environment.pinned(group):
            environment.split_requirement(requirement)


def test_pip_builds_with_the_versions_of_make() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    requires = text.split("requires = [", 1)[1].split("]", 1)[0]
    for requirement in environment.pinned("build") + environment.pinned("thunderkittens"):
        assert f'"{requirement}"' in requires


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    for folder in source_digest.FOLDERS:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.h").write_text("int a;\n")
    return tmp_path


@pytest.mark.parametrize("folder", source_digest.FOLDERS)
def test_digest_changes_with_any_source(sources: Path, folder: str) -> None:
    before = source_digest.source_digest(sources)
    assert source_digest.source_digest(sources) == before
    changed = sources / folder / "a.h"
    changed.write_text("int b;\n")
    after_edit = source_digest.source_digest(sources)
    changed.rename(changed.with_name("b.h"))
    after_rename = source_digest.source_digest(sources)
    (sources / folder / "cost_models").mkdir()
    (sources / folder / "cost_models" / "gpu.json").write_text("{}")
    after_new_file = source_digest.source_digest(sources)
    assert len({before, after_edit, after_rename, after_new_file}) == 4


def test_digest_ignores_what_is_no_source(sources: Path) -> None:
    before = source_digest.source_digest(sources)
    (sources / "scheduler" / "notes.md").write_text("x")
    (sources / "scheduler" / "__pycache__").mkdir()
    (sources / "scheduler" / "__pycache__" / "a.pyc").write_text("x")
    assert source_digest.source_digest(sources) == before


@pytest.mark.parametrize(
    ("module", "setting"),
    [("build", "NVCC_FLAGS"), ("build", "CXX_FLAGS"), ("fetch_thunderkittens", "SHA256")],
)
def test_digest_changes_with_what_else_decides_the_machine_code(
    sources: Path, monkeypatch: pytest.MonkeyPatch, module: str, setting: str
) -> None:
    before = source_digest.source_digest(sources)
    of = getattr(source_digest, module)
    monkeypatch.setattr(of, setting, getattr(of, setting) + " ")
    assert source_digest.source_digest(sources) != before


def valid_results(digest: str = "d1") -> dict[str, object]:
    row = Row(shapes.SHAPES["B8_1k_q1_h16"], "mla_decode", us=4.0, rel_err=2e-3)
    return {
        "device": "NVIDIA H200",
        "commit": "0" * 40,
        "source_digest": digest,
        "date": "2026-11-21",
        "torch": "2.11.0+cu130",
        "cuda": "13.0",
        "floor": row.floor.as_json(),
        "correctness": [{"case": "one", "rel_err": 2e-3, "lse_max_abs_err": 1e-7, "passed": True}],
        "benchmark": [row.as_json()],
    }


def test_results_schema_accepts_what_is_written() -> None:
    results.check_schema(json.loads(json.dumps(valid_results())))


def test_results_schema_accepts_older_files_without_a_floor() -> None:
    older = valid_results()
    del older["floor"]
    results.check_schema(older)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("correctness", "passed", 1),
        ("correctness", "rel_err", math.nan),
        ("benchmark", "us", "4"),
        ("benchmark", "us", True),
        ("benchmark", "impl", "other"),
        ("benchmark", "extra", 1),
    ],
)
def test_results_schema_rejects(part: str, field: str, value: object) -> None:
    record = json.loads(json.dumps(valid_results()))
    record[part][0][field] = value
    with pytest.raises(results.ResultsError, match=part):
        results.check_schema(record)


def test_results_schema_rejects_a_missing_field() -> None:
    record = valid_results()
    del record["cuda"]
    with pytest.raises(results.ResultsError, match="fields"):
        results.check_schema(record)


def test_results_schema_rejects_a_floor_that_does_not_say_whether_it_was_measured() -> None:
    record = json.loads(json.dumps(valid_results()))
    del record["floor"]["measured"]
    with pytest.raises(results.ResultsError, match="floor: expected the fields"):
        results.check_schema(record)


def test_stale_results_fail_unless_pending_names_digest_and_reason(tmp_path: Path) -> None:
    pending = tmp_path / results.PENDING
    with pytest.raises(results.ResultsError, match="no device has results"):
        results.check_digests("d1", tmp_path)
    for device in ("nvidia-h100", "nvidia-h200"):
        (tmp_path / f"{device}.json").write_text(json.dumps(valid_results("d1")))
    assert results.check_digests("d1", tmp_path) == ""

    (tmp_path / "nvidia-h100.json").write_text(json.dumps(valid_results("d0")))
    with pytest.raises(results.ResultsError, match=r"nvidia-h100\.json: measured with other"):
        results.check_digests("d1", tmp_path)
    pending.write_text(json.dumps({"source_digest": "d0", "reason": "no H100 today"}))
    with pytest.raises(results.ResultsError, match="names another digest"):
        results.check_digests("d1", tmp_path)
    pending.write_text(json.dumps({"source_digest": "d1", "reason": " "}))
    with pytest.raises(results.ResultsError, match="no reason"):
        results.check_digests("d1", tmp_path)
    with pytest.raises(results.ResultsError, match="reason is needed"):
        results.write_pending(" ", "d1", tmp_path)
    assert results.write_pending("no H100 today", "d1", tmp_path) == pending
    assert "no H100 today" in results.check_digests("d1", tmp_path)


def test_device_slug() -> None:
    assert results.slug("NVIDIA H200") == "nvidia-h200"
    assert results.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_shapes_are_the_published_ones() -> None:
    table = {
        name: (
            sum(shape.seq_lens),
            len(shape.seq_lens),
            shape.new_tokens,
            shape.num_heads,
            round(shape.kv_bytes / 1e6, 1),
        )
        for name, shape in shapes.SHAPES.items()
    }
    assert table == {name: row[:-1] for name, row in PUBLISHED.items()}


@pytest.mark.parametrize("shape", shapes.SHAPES.values(), ids=lambda shape: shape.name)
def test_the_assumed_floor_agrees_with_that_of_the_published_shapes(shape: shapes.Shape) -> None:
    assert shapes.ASSUMED.us(shape) == pytest.approx(PUBLISHED[shape.name][-1], rel=0.04)


def test_random_shapes_repeat_with_their_seed() -> None:
    first = shapes.random_shapes(50, seed=7)
    assert first == shapes.random_shapes(50, seed=7)
    assert first != shapes.random_shapes(50, seed=8)
    assert all(min(shape.seq_lens) >= shape.new_tokens for shape in first)


def test_copies_leave_l2_within_bounds_and_memory() -> None:
    l2 = 60 << 20
    assert case.number_of_copies(1208 * 10**6, l2) == 2
    assert case.number_of_copies(75 * 10**6, l2) == 4
    assert case.number_of_copies(9 * 10**6, l2) == 8
    assert case.number_of_copies(10**9, l2, max_bytes=10**9) == 1


def test_copies_are_used_again_only_when_they_have_left_l2() -> None:
    l2 = 60 << 20
    assert case.calls_per_copy(2, 1208 * 10**6, l2) == 4
    assert case.calls_per_copy(4, 75 * 10**6, l2) == 2
    assert case.calls_per_copy(8, 9 * 10**6, l2) == 1


def test_reference_is_causal_attention_over_the_paged_cache() -> None:
    shape = shapes.Shape("small", (3, 130), new_tokens=2, num_heads=4)
    made = case.make_case(shape, torch.device("cpu"), copies=1)
    row, length, token, head = 1, 130, 0, 3
    keys = torch.stack(
        [
            made.kv_cache[0][made.block_table[row, position // 64], position % 64, 0]
            for position in range(length - 1)  # the last key is newer than token 0
        ]
    ).double()
    weights = (keys @ made.q[0][row, token, head].double() * case.SOFTMAX_SCALE).softmax(0)
    expected = weights @ keys[:, :512]
    torch.testing.assert_close(made.reference[0][row, token, head].double(), expected)
    assert made.block_table[0, 0] != made.block_table[1, 0]


def test_relative_error_of_a_poisoned_output_is_infinite() -> None:
    expected = torch.ones(4)
    assert case.relative_error(expected, expected) == 0
    assert case.relative_error(torch.tensor([1, 1, 1, math.nan]), expected) == math.inf


def test_bench_table_shows_floor_and_peers() -> None:
    shape = shapes.SHAPES["B8_1k_q1_h16"]
    floor = shapes.Floor(launch_us=1.8, bytes_per_us=shape.bytes / 2, measured=True)  # 3.8 us
    rows = [
        Row(shape, "mla_decode", us=7.6, rel_err=2e-3, floor=floor),
        Row(shape, "flash_mla", us=15.2, rel_err=2e-3, floor=floor),
        Row(shape, "flashinfer_fa3", error="UnavailableError: flashinfer-python: not there"),
    ]
    ours, theirs, missing = bench.table_lines(rows)
    assert "2.00x flash_mla" in ours
    assert " 4.00 " in theirs
    assert missing.endswith("** UnavailableError: flashinfer-python: not there")


def test_bench_refuses_an_unknown_shape(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--shapes", "B1_nothing"])
    assert "unknown shapes" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_and_gpu_check_say_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err
    command = [sys.executable, str(ROOT / "tools" / "gpu_check.py")]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 2
    assert "no CUDA GPU" in answer.stderr


GpuCheck = Callable[[list[str], dict[str, object], list[Row]], tuple[int, dict[str, Any]]]


@pytest.fixture
def run_gpu_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> GpuCheck:
    """gpu_check of tests that failed, a correctness row and rows of the benchmark."""
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "FOLDER", tmp_path / "results")

    def run(
        failed: list[str], case_row: dict[str, object], rows: list[Row]
    ) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(gpu_check, "run_tests", lambda extra: (failed, [case_row]))
        monkeypatch.setattr(bench, "run", lambda *arguments: rows)
        status = gpu_check.main()
        record = json.loads((tmp_path / "results" / "nvidia-h200.json").read_text())
        results.check_schema(record)
        return status, record

    return run


@pytest.mark.parametrize("failed", [[], ["tests.test_mla::test_one"]], ids=("passed", "failed"))
@pytest.mark.parametrize("passed", [True, False])
def test_gpu_check_writes_results_that_the_schema_accepts(
    passed: bool,
    failed: list[str],
    run_gpu_check: GpuCheck,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rel_err = 2e-3 if passed else math.inf
    case_row = {"case": "one", "rel_err": rel_err, "lse_max_abs_err": 0.0, "passed": passed}
    floor = shapes.Floor(1.2, 4.5e6, measured=True)
    rows = [
        Row(shape, "mla_decode", us=10.0, rel_err=2e-3, floor=floor)
        for shape in shapes.SHAPES.values()
    ]
    rows.append(Row(rows[0].shape, "flash_mla", error="not there"))
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setenv("OUT", str(out))

    status, record = run_gpu_check(failed, gpu_check.finite(case_row), rows)
    assert status == (0 if passed and not failed else 1)
    assert all(name in capsys.readouterr().out.splitlines()[-1] for name in failed)
    assert record["source_digest"] == source_digest.source_digest()
    assert record["failed_tests"] == failed
    assert [row["shape"] for row in record["benchmark"]] == list(shapes.SHAPES)
    assert record["floor"] == floor.as_json()
    assert json.loads((out / "nvidia-h200.json").read_text()) == record


@pytest.mark.parametrize("impl", ["mla_decode", "flash_mla"])
def test_gpu_check_keeps_no_figure_of_a_wrong_output_and_counts_it_as_a_failure(
    impl: str, run_gpu_check: GpuCheck, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = shapes.SHAPES["B8_1k_q1_h16"]
    impls = ("mla_decode", "flash_mla", "flashinfer_fa3")
    rows = [Row(shape, name, us=4.0, rel_err=2e-3) for name in impls]
    wrong = rows[impls.index(impl)]
    wrong.rel_err, wrong.error = 0.5, "wrong output: relative error 5.00e-01"
    case_row = {"case": "one", "rel_err": 2e-3, "lse_max_abs_err": 0.0, "passed": True}
    status, record = run_gpu_check([], case_row, rows)
    failure = f"benchmark: B8_1k_q1_h16, {impl}: wrong output: relative error 5.00e-01"
    assert status == 1
    assert failure in capsys.readouterr().out.splitlines()[-1]
    assert record["failed_tests"] == [failure]
    assert [row["impl"] for row in record["benchmark"]] == [x for x in impls if x != impl]


def test_gpu_check_names_the_tests_that_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "CORRECTNESS_LOG", tmp_path / "build" / "rows.jsonl")
    test = tmp_path / "test_some.py"
    test.write_text(
        "import pytest\npytestmark = pytest.mark.gpu\n\n"
        "def test_good(): pass\n\n"
        "@pytest.mark.parametrize('x', (1, 2))\ndef test_bad(x): assert x == 1\n"
    )
    quietly = ["-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}"]
    assert gpu_check.run_tests(quietly) == (["test_some::test_bad[2]"], [])
    test.write_text("def test_of_no_gpu(): pass\n")
    assert gpu_check.run_tests(quietly) == (["pytest ended with status 5"], [])


def test_a_gpu_test_is_skipped_loudly(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "test_gpu.py").write_text(
        "import pytest\n\n@pytest.mark.gpu\ndef test_gpu(record_correctness):\n"
        "    record_correctness('case', 1e-3, 1e-7, True)\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    text = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True).stdout
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "GPU tests did NOT run" in text
    assert "1 tests skipped: no CUDA GPU" in text
