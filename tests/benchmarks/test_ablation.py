"""Protects the ablation: every part can be turned off alone, runs are kept, effects are differences of equal seeds."""

import json

from benchmarks import ablation


def test_a_small_ablation_runs_and_reports(teacher, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablation, "OFF", {name: ablation.OFF[name] for name in ("nothing", "attention", "schedule")})
    out, file = tmp_path / "out", tmp_path / "figures.json"
    small = {
        "rows": 8,
        "eval_rows": 2,
        "length": 16,
        "least_characters": 10,
        "layers": 2,
        "heads": '{"1": [0, 1]}',
        "inner": "[1]",
        "inner_bytes": 8,
        "top_k": 8,
        "hidden_bytes": 8,
        "steps": 2,
        "batch_size": 2,
        "precision": '"fp32"',
        "seeds": [0],
    }
    arguments = ["--data", str(data), "--teacher", str(teacher), "--out", str(out), "--json", str(file)]
    for key, value in small.items():
        arguments += ["--set", f"{key}={value}"]
    ablation.main(arguments)
    figures = json.loads(file.read_text())
    assert set(figures["without"]) == {"attention", "schedule"}
    with_all, without = figures["runs"][0], figures["runs"][1]
    assert figures["without"]["attention"]["ce"] == [round(without["ce"] - with_all["ce"], 5)]
    assert "difference to everything on" in capsys.readouterr().out
