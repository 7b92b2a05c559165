"""`benchmarks/gpu.sh` runs without a GPU: its table holds what each part found, also where one fails."""

import os
import subprocess
import sys

import pytest

from captioning.files import PROJECT


sys.path.insert(0, str(PROJECT / "benchmarks"))
import gpu


def run_gpu_sh(*words, **environment):
    command = ["bash", "benchmarks/gpu.sh", *map(str, words)]
    own = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=PROJECT, env=os.environ | own | environment, capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.slow
def test_parts_are_run_and_their_rows_are_in_the_table(tmp_path):
    parts = ["tokens", "gradients", "two_processes", "out_of_memory"]
    status, _ = run_gpu_sh(tmp_path, "--device", "cpu", "--only", *parts, QUICK="1")
    report = (tmp_path / "report.md").read_text()
    assert status == 0, report
    for part in parts:
        assert f"\n| {part} | " in report and (tmp_path / f"{part}.json").exists()
    assert "3 beams, float32: captions that differ from stock's | 0 of 4" in report
    assert "not run: a CPU would swap" in report and "Quick: small models" in report


@pytest.mark.parametrize(("rate", "reached"), [(90.0, False), (110.0, True)])
def test_the_input_pipeline_must_be_ahead_of_evaluation_and_training(rate, reached):
    loader = [{"name": "L PNG", "workers": 8, "cores": 16, "images_per_second": rate}]
    found = {"evaluation_base": {"images_per_second": 80.0}, "training_base": {"images_per_second": 100.0}}
    assert gpu.rows_of({"loader": loader}, found)[0]["reached"] is reached
    assert "ratio" not in gpu.rows_of({"loader": loader}, {})[0], "neither has been measured"


@pytest.mark.slow
def test_a_part_that_takes_too_long_is_ended_and_reported(tmp_path):
    status, _ = run_gpu_sh(
        tmp_path, "--quick", "--device", "cpu", "--seconds", "1.1", "--only", "tokens", "memory_base"
    )
    report = (tmp_path / "report.md").read_text()
    assert status == 1 and "| tokens | failed: more than 5 s |" in report
    assert "| memory_base | not run: no time left |" in report


@pytest.mark.parametrize("fails", [False, True])
def test_parts_run_without_graphs_where_tokens_fail_with_them(tmp_path, monkeypatch, fails):
    seen = []

    def run(name, limit, words, arguments):
        seen.append((name, gpu.os.environ.get("CUDA_GRAPHS")))
        return "failed: exit status 1" if fails and seen == [("tokens", None)] else "1 s"

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu.os, "environ", {})
    arguments = gpu.argparse.Namespace(out=tmp_path, device="cpu", quick=True, seconds=9, only=["tokens", "profile"])
    assert gpu.main(arguments) == fails
    again = [("tokens", "0"), ("profile", "0")] if fails else [("profile", None)]
    assert seen == [("tokens", None), *again]


@pytest.mark.slow
def test_no_gpu_is_one_line(tmp_path):
    status, errors = run_gpu_sh(tmp_path, CUDA_VISIBLE_DEVICES="")
    assert status == 2 and errors.count("\n") == 1 and errors.startswith("error: PyTorch finds no GPU")
