"""The command line: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mla_decode
import pytest
import torch
from fake_timing import fake_gpu
from mla_decode import cli, doctor, reference
from mla_decode.cli import EXIT_FAILED, EXIT_OK, EXIT_UNSUPPORTED, EXIT_USAGE, main, parse_seq_lens

SMALL = ["--seq-lens", "700,64x2", "--heads", "8", "--new-tokens", "2", "--device", "cpu"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        code = main(arguments)
    except SystemExit as leaving:  # argparse
        code = int(leaving.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_lengths_are_read_in_both_notations() -> None:
    assert parse_seq_lens("4641,45118") == [4641, 45118]
    assert parse_seq_lens("4096x3, 7") == [4096, 4096, 4096, 7]


def test_demo_schedules_runs_checks_and_saves(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, err = run(capsys, "demo", *SMALL, "--out", str(tmp_path))
    assert (code, err) == (EXIT_OK, "")
    for part in ("instructions", "workers", "pieces per request", "predicted", "interpreter"):
        assert part in out
    assert "relative L2" in out
    assert out.rstrip().endswith("passed")
    assert (tmp_path / "demo-predicted.png").stat().st_size > 10_000
    trace = json.loads((tmp_path / "demo-predicted.perfetto.json").read_text())
    assert trace["traceEvents"]
    for name in ("demo-predicted.png", "demo-predicted.perfetto.json"):
        assert str(tmp_path / name) in out


def test_demo_never_calls_the_interpreters_time_a_gpus(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _, out, _ = run(capsys, "demo", *SMALL, "--out", str(tmp_path))
    (line,) = [line for line in out.splitlines() if line.startswith("time ")]
    assert "CPU interpreter" in line
    assert "x the floor" not in line


def test_demo_fails_when_the_result_is_wrong(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = reference.attention

    def off(case: reference.Case) -> object:
        out, lse = honest(case)
        return out * 1.01, lse

    monkeypatch.setattr(reference, "attention", off)
    code, out, _ = run(capsys, "demo", *SMALL, "--out", str(tmp_path))
    assert code == EXIT_FAILED
    assert "FAILED" in out


def test_plan_prints_saves_and_loads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    code, out, _ = run(capsys, "plan", *SMALL, "--table", "--save", str(path))
    assert code == EXIT_OK
    plan = mla_decode.Plan.load(path)
    assert f"{plan.num_instructions} instructions" in out
    assert plan.table() in out
    code, out, _ = run(capsys, "plan", "--load", str(path))
    assert code == EXIT_OK
    assert plan.summary() in out


def test_plan_takes_the_rows_of_a_row_group(capsys: pytest.CaptureFixture[str]) -> None:
    batch = ("plan", "--seq-lens", "402", "--heads", "128", "--new-tokens", "1")
    for arguments, groups in (((), "groups of 16"), (("--group-rows", "32"), "groups of 32")):
        code, out, _ = run(capsys, *batch, *arguments)
        assert code == EXIT_OK
        assert groups in " ".join(out.split())
    assert "groups" not in run(capsys, *batch, "--group-rows", "64")[1]


def test_tune_ranks_policies_and_saves_the_best(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "best.npz"
    code, out, _ = run(capsys, "tune", *SMALL, "--tiles", "2", "4", "--save", str(path))
    assert code == EXIT_OK
    for name in ("balanced", "backward", "unsplit", "fixed 2", "fixed 4"):
        assert name in out
    best = mla_decode.Plan.load(path)
    others = [mla_decode.plan([700, 64, 64], 8, 2, policy=p) for p in ("backward", "unsplit")]
    assert best.predicted_us <= min(p.predicted_us for p in others)


def test_tune_compares_row_groups(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "best.json"
    batch = ("tune", "--seq-lens", "402", "--heads", "128", "--new-tokens", "1", "--device", "cpu")
    code, out, _ = run(capsys, *batch, "--tiles", "2", "--save", str(path))
    assert code == EXIT_OK
    for name in ("balanced, 16 rows", "balanced, 32 rows", "balanced  "):
        assert name in out
    assert "best: balanced, 16 rows" in out
    assert mla_decode.Plan.load(path).group_rows == 16
    assert " rows" not in run(capsys, *batch[:4], "16", *batch[5:])[1]


def test_trace_writes_both_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "trace", *SMALL, "--out", str(tmp_path))
    assert code == EXIT_OK
    assert "predicted only" in out
    assert {p.name for p in tmp_path.iterdir()} == {
        "trace-predicted.png",
        "trace-predicted.perfetto.json",
    }
    code, _, _ = run(capsys, "trace", *SMALL, "--interpreter", "--out", str(tmp_path))
    assert code == EXIT_OK
    assert (tmp_path / "trace-interpreter.perfetto.json").exists()


def test_trace_of_a_saved_plan_runs_that_plan(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    mla_decode.plan([900], 16, 1, num_workers=5).save(path)
    arguments = ["--load", str(path), "--interpreter", "--device", "cpu", "--out", str(tmp_path)]
    code, _, err = run(capsys, "trace", *arguments)
    assert (code, err) == (EXIT_OK, "")
    trace = json.loads((tmp_path / "trace-interpreter.perfetto.json").read_text())
    assert trace["otherData"]["shape"] == "1 request of 900 tokens, 1 new token, 16 heads"


def test_doctor_names_what_is_there_and_what_is_missing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = run(capsys, "doctor")
    assert code == EXIT_OK
    for part in ("python", "torch", "scheduler", "matplotlib", "kernels", "gpu"):
        assert part in out
    able = doctor.can_launch(doctor.examine())
    assert f"The megakernel {'can' if able else 'cannot'} run here" in out


def test_doctor_notices_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = doctor._package("no-such-package", "tests")
    assert (finding.state, finding.detail) == ("missing", "not installed; used for tests")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["plan", "--heads", "129"],
            EXIT_UNSUPPORTED,
            "UnsupportedError: num_heads: expected at most 128",
        ),
        (["plan", "--new-tokens", "17"], EXIT_UNSUPPORTED, "new_tokens: expected 1 to 16, got 17"),
        (["plan", "--seq-lens=-1"], EXIT_FAILED, "RangeError: seq_lens: request 0"),
        (["plan", "--load", "/nowhere/plan.json"], EXIT_FAILED, "FileNotFoundError"),
        (["trace", "--policy", "fixed"], EXIT_FAILED, "RangeError: split_tiles: expected 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line(
    arguments: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    got, _, err = run(capsys, *arguments)
    assert got == code
    assert message in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["plan", "--seq-lens", "many"], ["plan", "--policy", "best"], ["plan", "--x"]],
    ids=str,
)
def test_bad_usage_exits_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, *arguments)
    assert code == EXIT_USAGE
    assert "usage: " in err


def test_cuda_without_a_gpu_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.torch.cuda, "is_available", lambda: False)
    code, _, err = run(capsys, "demo", "--device", "cuda")
    assert code == EXIT_UNSUPPORTED
    assert err == "UnsupportedError: device: expected a Hopper GPU, no CUDA GPU\n"


def test_bench_passes_its_arguments_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fake:
        seen: tuple[str, ...] = ()

        @classmethod
        def main(cls, argv: list[str]) -> int:
            cls.seen = tuple(argv)
            return 5

    monkeypatch.setattr(cli.importlib, "import_module", lambda name: Fake)
    code, _, _ = run(capsys, "bench", "--shapes", "B8_1k_q1_h16")
    assert code == 5
    assert Fake.seen == ("--shapes", "B8_1k_q1_h16")


def test_bench_without_the_repository_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> object:
        raise ModuleNotFoundError(name, name="benchmarks")

    monkeypatch.setattr(cli.importlib, "import_module", absent)
    code, _, err = run(capsys, "bench", "--shapes", "x")
    assert code == EXIT_UNSUPPORTED
    assert "bench: --shapes x: expected the repository's benchmarks" in err


def test_bench_names_what_the_repositorys_benchmarks_lack(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(name: str) -> object:
        raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

    monkeypatch.setattr(cli.importlib, "import_module", lacking)
    code, out, err = run(capsys, "bench")
    assert (code, out) == (EXIT_UNSUPPORTED, "")
    assert err == "UnsupportedError: bench: expected numpy, it is not installed\n"


@pytest.mark.parametrize("launches", ["right", "nothing", "wrong"])
def test_the_small_bench_gives_a_figure_only_of_a_right_output(
    launches: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, case = mla_decode.plan([300, 70], 16, 4), reference.make_case([300, 70], 16, 4)
    expected = reference.attention(case)
    with fake_gpu(monkeypatch) as gpu:

        def decode_case(
            *arguments: object, out: torch.Tensor, lse: torch.Tensor, **_: object
        ) -> None:
            def work() -> None:
                out.copy_(expected[0] * (1.01 if gpu.replayed and launches == "wrong" else 1))
                lse.copy_(expected[1])

            if gpu.capturing is None or launches != "nothing":
                gpu.enqueue(work)

        monkeypatch.setitem(sys.modules, "benchmarks.bench", None)  # not there
        monkeypatch.setattr(cli.native, "require", lambda device: None)
        monkeypatch.setattr(cli, "plan", lambda *batch: made)
        monkeypatch.setattr(cli.reference, "make_case", lambda *batch, device: case)
        monkeypatch.setattr(cli.measure, "synchronize", lambda: None)
        monkeypatch.setattr(cli.measure, "decode_case", decode_case)
        code, out, _ = run(capsys, "bench")
    if launches == "right":
        assert code == EXIT_OK and " us, " in out and " x floor" in out
    else:
        assert code == EXIT_FAILED and "FAILED: wrong output, no figure" in out
        assert " us" not in out and "x floor" not in out


def test_module_runs_as_a_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mla_decode", "plan", "--seq-lens=-1"],
        env={**os.environ, "PYTHONPATH": str(Path(mla_decode.__file__).resolve().parents[1])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == EXIT_FAILED
    assert done.stderr.startswith("RangeError: seq_lens")
    assert "Traceback" not in done.stderr
