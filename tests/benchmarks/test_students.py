"""Protects the comparison of targets: it runs, resumes and adds up, and a share is undefined where the gap is noise."""

import json

import pytest

from benchmarks import students


def test_a_small_grid_runs_resumes_and_reports(teacher, data, tmp_path, capsys):
    out, file = tmp_path / "out", tmp_path / "figures.json"
    small = {
        "layers": 2,
        "seeds": [0, 1],
        "steps": 2,
        "stage_steps": 1,
        "batch_size": 2,
        "length": 16,
        "train_rows": 8,
        "eval_rows": 2,
        "measured_rows": 2,
        "least_characters": 10,
        "top_k": 8,
        "few": 2,
        "num_samples": 5,
        "calibration_tokens": 60,
        "precision": '"fp32"',
    }
    arguments = ["--data", str(data), "--teacher", str(teacher), "--out", str(out), "--json", str(file)]
    for key, value in small.items():
        arguments += ["--set", f"{key}={value}"]
    students.main(arguments)
    figures = json.loads(file.read_text())
    assert figures["finished_runs"] == figures["planned_runs"] == 48
    assert all(run["kl_at_1"] > 0 and run["trained_tokens"] > 0 for run in figures["runs"])
    sizes = figures["bytes_per_token"]
    assert sizes["renormalised"] < sizes["bucket"] < sizes["low_rank"]
    one = out / "runs" / "T4-low_rank-seed1.json"
    before, stamp = json.loads(one.read_text()), (out / "runs" / "T4-full-seed1.json").stat().st_mtime_ns
    one.unlink()
    students.main(["--data", str(data), "--out", str(out)])  # the settings are the folder's
    again = json.loads(one.read_text())
    assert {**again, "train_cpu_seconds": 0} == {**before, "train_cpu_seconds": 0}
    assert (out / "runs" / "T4-full-seed1.json").stat().st_mtime_ns == stamp
    assert "worst share" in capsys.readouterr().out


def made_up(*, full, renormalised, low_rank):
    runs = []
    for target, values in (("full", full), ("renormalised", renormalised), ("low_rank", low_rank)):
        runs += [
            {"setting": "T=1", "target": target, "seed": seed, "kl_at_1": value} for seed, value in enumerate(values)
        ]
    return runs


def test_shares_are_paired_by_seed():
    """Seeds differ far more than targets do, and the shares are exact all the same."""
    (entry,) = students.compare(made_up(full=[1, 5, 9], renormalised=[2, 6.1, 10], low_rank=[1.1, 5.11, 9.1]))
    assert entry["defined"]
    assert entry["shares"]["low_rank"]["mean"] == pytest.approx(0.9)
    assert entry["shares"]["low_rank"]["half_interval"] == pytest.approx(0.0, abs=1e-9)


def test_a_gap_within_the_noise_is_undefined():
    (entry,) = students.compare(made_up(full=[1, 1, 1], renormalised=[1.3, 0.9, 1.0], low_rank=[1, 1, 1]))
    assert not entry["defined"]
    (one_seed,) = students.compare(made_up(full=[1], renormalised=[2], low_rank=[1.5]))
    assert not one_seed["defined"]
    assert one_seed["shares"]["low_rank"] == {"mean": 0.5, "half_interval": None}
