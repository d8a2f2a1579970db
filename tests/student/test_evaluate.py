"""Protects held-out figures: equal to dense float64 figures of the same weights, for base models and checkpoints."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from distill.cache.reader import CacheReader
from distill.cache.tail import rebuild
from distill.errors import UsageError
from distill.student.evaluate import evaluate_model
from distill.student.trainer import train_stage

VOCAB = 300


def dense_figures(folder, cache, temperature, kind="low_rank", department=None):
    """KL, CE and agreement of each domain by the book, of one department or all: full logits, float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reader = CacheReader.open(cache)
    column = reader.temperature_index(temperature)
    figures = {}
    for domain in reader.domains:
        kl, ce, agreed = [], [], []
        for commit in reader.units(domain):
            for row in reader.sequences(commit, "eval"):
                if department and row.prompt.metadata.get("department") != department:
                    continue
                mask, targets = row.prompt.loss_mask, row.targets
                ids = torch.from_numpy(row.prompt.input_ids.astype(np.int64))
                with torch.no_grad():
                    z_NV = model(ids[None]).logits[0, :-1, :VOCAB].double()[mask]
                tail = np.zeros((int(mask.sum()), VOCAB))
                if kind == "low_rank":
                    hidden = {bits: values[mask] for bits, values in targets.hidden.items()}
                    tail = reader.projection.tail_logits(reader.projection.dequantise(hidden))
                p_NV = torch.from_numpy(
                    rebuild(
                        kind,
                        temperature=temperature,
                        topk_ids_NK=targets.topk_ids[mask],
                        topk_logprobs_NK=targets.topk_logprobs[mask],
                        log_z_N=targets.log_z[mask][:, column],
                        log_tail_N=targets.log_tail[mask][:, column],
                        tail_logits_NV=tail,
                    )
                )
                kl += (p_NV * (p_NV.log() - (z_NV / temperature).log_softmax(1))).sum(1).tolist()
                ce += torch.nn.functional.cross_entropy(z_NV, ids[1:][mask], reduction="none").tolist()
                agreed += (z_NV.argmax(1).numpy() == targets.topk_ids[mask][:, 0]).tolist()
        if kl:
            figures[domain] = (np.mean(kl), np.mean(ce), np.mean(agreed), len(kl))
    return figures


def test_figures_equal_the_dense_reference(configured, world):
    evaluation = evaluate_model(configured())
    assert evaluation.tail == "low_rank"
    for temperature in (4.0, 2.0, 1.0):
        expected = dense_figures(world.student, world.cache, temperature)
        for domain, (kl, ce, agreed, num) in expected.items():
            figures = evaluation.domains[domain]
            assert figures.kl[temperature] == pytest.approx(kl, rel=1e-4)
            assert figures.ce == pytest.approx(ce, rel=1e-5)
            assert figures.perplexity == pytest.approx(math.exp(ce), rel=1e-4)
            assert figures.top1_agreement == pytest.approx(agreed)
            assert (figures.num_tokens, figures.num_sequences) == (num, 8)
    overall = evaluation.overall
    assert sum(part.num_tokens for part in overall.calibration) == overall.num_tokens
    gaps = [part.num_tokens * abs(part.confidence - part.accuracy) for part in overall.calibration]
    assert sum(gaps) / overall.num_tokens == pytest.approx(overall.ece)
    assert [part.confidence for part in overall.calibration] == sorted(part.confidence for part in overall.calibration)
    assert overall.kl[1.0] == pytest.approx(np.mean([f.kl[1.0] for f in evaluation.domains.values()]))


@pytest.mark.parametrize("department", ["cardiology", "neurology"])
def test_figures_of_a_group_equal_the_dense_reference(configured, world, department):
    ((kl, ce, agreed, num),) = dense_figures(world.student, world.cache, 2.0, department=department).values()
    figures = evaluate_model(configured(), group_by="department").groups[department]
    assert figures.kl[2.0] == pytest.approx(kl, rel=1e-4)
    assert figures.ce == pytest.approx(ce, rel=1e-5)
    assert figures.perplexity == pytest.approx(math.exp(ce), rel=1e-4)
    assert figures.top1_agreement == pytest.approx(agreed)
    assert figures.num_tokens == num


@pytest.mark.parametrize("domain", ["general", "medical"])
def test_agreement_and_calibration_equal_the_reference(configured, world, domain):
    """Top-5 as overlap of two sets, calibration as in Guo et al. 2017, from the model's own logits in float64."""
    model = AutoModelForCausalLM.from_pretrained(world.student, dtype=torch.float32)
    reader = CacheReader.open(world.cache)
    overlap, confidence, correct = [], [], []
    for commit in reader.units(domain):
        for row in reader.sequences(commit, "eval"):
            ids, mask = torch.from_numpy(row.prompt.input_ids.astype(np.int64)), row.prompt.loss_mask
            with torch.no_grad():
                p_NV = model(ids[None]).logits[0, :-1, :VOCAB].double()[mask].softmax(1).numpy()
            for p_V, theirs_K in zip(p_NV, row.targets.topk_ids[mask], strict=True):
                overlap.append(len(set(np.argsort(-p_V)[:5]) & set(theirs_K[:5])) / 5)
            confidence += p_NV.max(1).tolist()
            correct += (p_NV.argmax(1) == ids[1:].numpy()[mask]).tolist()
    confidence, correct = np.array(confidence), np.array(correct)
    bins = np.minimum((confidence * 15).astype(int), 14)
    weighed = [
        (bins == b).mean() * abs(confidence[bins == b].mean() - correct[bins == b].mean()) for b in np.unique(bins)
    ]
    figures = evaluate_model(configured()).domains[domain]
    assert figures.top5_agreement == pytest.approx(np.mean(overlap))
    assert figures.ece == pytest.approx(sum(weighed), rel=1e-4)


def test_groups_are_told_apart_and_add_up(configured):
    evaluation = evaluate_model(configured(), group_by="department")
    assert list(evaluation.groups) == ["(none)", "cardiology", "neurology"]
    departments = [evaluation.groups[name] for name in ("cardiology", "neurology")]
    medical = evaluation.domains["medical"]
    assert sum(figures.num_tokens for figures in departments) == medical.num_tokens
    assert sum(f.ce * f.num_tokens for f in departments) / medical.num_tokens == pytest.approx(medical.ce)
    assert departments[0].ce != departments[1].ce
    assert evaluation.groups["(none)"].ce == pytest.approx(evaluation.domains["general"].ce)
    assert evaluate_model(configured()).groups == {}


def test_a_metadata_key_that_no_row_has_is_refused(configured):
    with pytest.raises(UsageError, match="metadata key 'ward'"):
        evaluate_model(configured(), group_by="ward")


def test_the_teacher_itself_is_as_close_as_the_cache_allows(configured, world):
    """The floor of every student: rounding of the cached numbers, and quantisation of the tail's shape."""
    teacher, student = evaluate_model(configured(), world.teacher).overall, evaluate_model(configured()).overall
    assert teacher.top1_agreement == 1.0
    assert teacher.top5_agreement == pytest.approx(1.0, abs=0.01)  # rounding may swap near equals
    assert abs(teacher.kl[1.0]) < 0.01
    assert student.kl[1.0] > 1
    assert abs(teacher.kl[4.0]) < 0.01


def test_a_cache_without_hidden_states_or_temperature_one(configured, bare_cache):
    evaluation = evaluate_model(configured(cache=str(bare_cache)))
    assert evaluation.tail == "bucket"
    assert list(evaluation.overall.kl) == [2.0]
    assert evaluation.overall.kl[2.0] < evaluate_model(configured()).overall.kl[2.0]  # less is told apart


def test_a_checkpoint_evaluates_as_training_said(configured):
    result = train_stage(configured(), 1, quiet=True)
    evaluation = evaluate_model(configured(), result.best)
    assert evaluation.domains["general"].kl[4.0] == pytest.approx(result.evaluation.domains["general"].kl[4.0])
    assert evaluation.domains["general"].ce == pytest.approx(result.evaluation.domains["general"].ce)
    assert set(evaluation.domains) == {"general", "medical"}


def test_batches_and_chunks_do_not_matter(configured):
    one, other = (
        evaluate_model(configured(micro_batch_tokens=tokens, head_chunk=chunk))
        for tokens, chunk in ((24, 5), (4096, 512))
    )
    assert one.overall.kl[2.0] == pytest.approx(other.overall.kl[2.0], rel=1e-5)


def test_a_model_that_is_not_there(configured, tmp_path):
    with pytest.raises(UsageError, match="there is no folder"):
        evaluate_model(configured(), tmp_path / "nothing")


def test_other_domains_are_shown_where_asked_and_count_in_nothing(configured, tmp_path):
    stage = {"shares": {"medical": 1.0}, "max_steps": 4, "eval_rows": 4, "sampling": "evaluation"}
    stage["sampling_by"] = "department"
    found = {}
    for which in ("stage", "all"):
        config = configured(stage={**stage, "eval_domains": which}).model_copy(update={"out": str(tmp_path / which)})
        found[which] = train_stage(config, 1, quiet=True).evaluation
    assert set(found["stage"].domains) == {"medical"}
    assert set(found["all"].domains) == {"general", "medical"}
    assert found["all"].domains["general"].num_tokens > 0
    assert found["all"].overall == found["stage"].overall == found["all"].domains["medical"]
    assert found["all"].groups == found["stage"].groups
