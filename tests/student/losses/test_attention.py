"""Protects the attention loss: both sides' maps against the models' own, value and gradient in float64, its floor."""

import dataclasses

import numpy as np
import pytest
import torch

from distill.cache.attention import AttentionSpec, dequantise, rebuild_map
from distill.config import AttentionConfig
from distill.errors import UsageError
from distill.student.attention import AttentionLoss, KeptHeads, SequenceHeads, layer_pairs
from distill.student.losses.attention import attention_distance, log_map, turned

LENGTH, HEADS, GROUPS, SIZE = 10, 4, 2, 8
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": SIZE,
    "initializer_range": 0.5,
}


def student_of(family, **changes):
    """A small random model in float64, on attention that shows its maps."""
    import transformers

    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes}, attn_implementation="eager")
    return getattr(transformers, f"{family}ForCausalLM")(config).double().eval()


def made_up_spec(*, heads=(0, 3), bias=True, window=None, soft_cap=None, interleaved=False, seed=0):
    random = np.random.default_rng(seed)
    kv_heads = tuple(sorted({head // 2 for head in heads}))
    return AttentionSpec(
        heads=heads,
        kv_heads=kv_heads,
        group=tuple(kv_heads.index(head // 2) for head in heads),
        head_dim=SIZE,
        q_bias=random.normal(size=(len(heads), SIZE)).astype(np.float32) if bias else None,
        k_bias=random.normal(size=(len(kv_heads), SIZE)).astype(np.float32) if bias else None,
        inv_freq=(1.0 / 100 ** (np.arange(3) / 3)).astype(np.float32),  # of 8 coordinates 6 turn
        rope_factor=1.1,
        interleaved=interleaved,
        softmax_scale=0.4,
        soft_cap=soft_cap,
        window=window,
    )


def made_up_heads(spec, length, positions, seed=1):
    random = np.random.default_rng(seed)
    num_q, num_k = len(spec.heads), len(spec.kv_heads)
    whole = KeptHeads(
        q=random.integers(-127, 128, (length, num_q * SIZE)).astype(np.int8),
        q_scale=(random.random((length, num_q)) * 0.03).astype(np.float32),
        k=random.integers(-127, 128, (length, num_k * SIZE)).astype(np.int8),
        k_scale=(random.random((length, num_k)) * 0.03).astype(np.float32),
    )
    return dataclasses.replace(whole, q=whole.q[positions], q_scale=whole.q_scale[positions]), whole


def maps_of(spec, whole):
    """The reference of the cache, [H, L, L] float64."""
    return torch.from_numpy(rebuild_map(dequantise(whole.q, whole.q_scale), dequantise(whole.k, whole.k_scale), spec))


def loss_of(model, specs, settings=None):
    settings = settings or AttentionConfig()
    return AttentionLoss(model.base_model, model.config.get_text_config(), specs, settings, depth=3)


def by_the_book(t_HNL, s_HNL, measure):
    if measure == "mse":
        return (t_HNL - s_HNL).square().sum(2).mean(0).sum()
    return (t_HNL * (t_HNL.clamp(min=1e-300).log() - s_HNL.clamp(min=1e-300).log())).sum(2).mean(0).sum()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (4, None), (None, 2.0)])
def test_the_teachers_map_is_the_caches(interleaved, window, soft_cap):
    spec = made_up_spec(interleaved=interleaved, window=window, soft_cap=soft_cap)
    _, whole = made_up_heads(spec, LENGTH, np.arange(LENGTH))
    places = torch.arange(LENGTH)

    def ready(values, scale, bias):
        x_LHd = torch.from_numpy(dequantise(values, scale)).double() + torch.from_numpy(bias)
        inv_freq = torch.from_numpy(spec.inv_freq).double()
        return turned(x_LHd, places, inv_freq, factor=spec.rope_factor, interleaved=interleaved)

    q_LHd = ready(whole.q, whole.q_scale, spec.q_bias)
    k_LHd = ready(whole.k, whole.k_scale, spec.k_bias)[:, list(spec.group)]
    got = log_map(q_LHd, k_LHd, places, scale=spec.softmax_scale, soft_cap=soft_cap, window=window).exp()
    torch.testing.assert_close(got, maps_of(spec, whole), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {}),
        ("Qwen2", {}),
        ("Qwen3", {}),
        ("Gemma2", {"sliding_window": 4, "attn_logit_softcapping": 3.0, "query_pad_token_id": None}),
    ],
)
@pytest.mark.parametrize("measure", ["kl", "mse"])
def test_value_and_gradient_are_those_of_the_models_own_maps(family, changes, measure):
    """Means over heads; two sequences, one of them padded; only trained positions count."""
    changes = {key: value for key, value in changes.items() if value is not None}
    model = student_of(family, **changes)
    spec = made_up_spec()
    loss = loss_of(model, {1: spec}, AttentionConfig(measure=measure))
    sequences, wholes = [], []
    for row, (length, positions) in enumerate([(LENGTH - 1, [3, 5, 8]), (6, [0, 4])]):
        kept, whole = made_up_heads(spec, length, positions, seed=row)
        sequences.append(SequenceHeads(row=row, start=0, positions=torch.tensor(positions), layers={1: kept}))
        wholes.append(whole)
    ids_BS = torch.randint(0, 50, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask_BS = torch.ones(2, LENGTH, dtype=torch.long)
    mask_BS[1, 7:] = 0
    found = model.base_model(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False, output_attentions=True)
    attention = model.base_model.layers[1].self_attn
    weights = (attention.q_proj.weight, attention.k_proj.weight)
    got = loss(sequences)
    want = sum(
        by_the_book(
            maps_of(spec, whole).mean(0, keepdim=True)[:, item.positions],
            found.attentions[1][item.row].mean(0, keepdim=True)[:, item.positions, : len(whole.k)],
            measure,
        )
        for item, whole in zip(sequences, wholes, strict=True)
    )
    assert want > 0.05
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    for one, other in zip(
        torch.autograd.grad(got, weights, retain_graph=True), torch.autograd.grad(want, weights), strict=True
    ):
        assert other.abs().max() > 1e-4
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_heads_that_are_named_stand_against_each_other():
    model, spec = student_of("Llama"), made_up_spec()
    loss = loss_of(model, {1: spec}, AttentionConfig(layers={1: 2}, heads={3: 1}))
    kept, whole = made_up_heads(spec, LENGTH - 1, np.arange(LENGTH - 1))
    places = torch.arange(LENGTH - 1)
    found = model.base_model(input_ids=torch.arange(LENGTH)[None], use_cache=False, output_attentions=True)
    got = loss([SequenceHeads(row=0, start=0, positions=places, layers={1: kept})])
    want = by_the_book(maps_of(spec, whole)[1:], found.attentions[2][0][1:2, places, : len(places)], "kl")
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_parts_of_a_long_sequence_and_a_row_that_is_shared_change_nothing(monkeypatch):
    model, spec = student_of("Llama"), made_up_spec()
    loss = loss_of(model, {1: spec})
    kept, _ = made_up_heads(spec, LENGTH - 1, np.arange(LENGTH - 1))
    alone = SequenceHeads(row=0, start=0, positions=torch.arange(LENGTH - 1), layers={1: kept})
    ids_1S = torch.arange(LENGTH)[None]
    model.base_model(input_ids=ids_1S, use_cache=False)
    want = loss([alone])
    monkeypatch.setattr("distill.student.attention._MAP_VALUES", 100)
    places = torch.cat([torch.arange(5), torch.arange(LENGTH)])[None]
    model.base_model(input_ids=torch.cat([ids_1S[:, :5], ids_1S], 1), position_ids=places, use_cache=False)
    got = loss([dataclasses.replace(alone, start=5)])
    torch.testing.assert_close(got, want)
    got.backward()


def test_alone_it_goes_down_to_what_int8_leaves():
    """A student that learns its teacher's maps; against itself the teacher is no better than the end of this."""
    spec = dataclasses.replace(made_up_spec(bias=False), rope_factor=1.0, softmax_scale=SIZE**-0.5)
    _, whole = made_up_heads(spec, LENGTH, np.arange(LENGTH))
    k_LHd = torch.randn(LENGTH, HEADS, SIZE, generator=torch.Generator().manual_seed(2)).requires_grad_()
    q_LHd = torch.randn(LENGTH, HEADS, SIZE, generator=torch.Generator().manual_seed(3)).requires_grad_()
    target = maps_of(spec, whole).float().clamp(min=1e-30).log()
    optimizer = torch.optim.Adam([q_LHd, k_LHd], lr=0.05)
    values = []
    for _ in range(400):
        optimizer.zero_grad()
        ours = log_map(q_LHd, k_LHd, torch.arange(LENGTH), scale=0.35, soft_cap=None, window=None)
        distance = attention_distance(target, ours[:2], measure="kl").mean()
        distance.backward()
        optimizer.step()
        values.append(distance.item())
    assert values[0] > 0.1
    assert values[-1] < 0.01 * values[0]


def test_layers_are_paired_by_depth_and_what_is_not_there_is_refused():
    specs = {0: made_up_spec(), 14: made_up_spec(), 29: made_up_spec()}
    pairs = layer_pairs(AttentionConfig(), specs, teacher_layers=30, student_layers=4)
    assert [(pair.teacher, pair.student) for pair in pairs] == [(0, 0), (14, 1), (29, 3)]
    for settings, words in (
        (AttentionConfig(layers={7: 1}), "keeps heads of 0, 14, 29"),
        (AttentionConfig(layers={14: 4}), "layers 0 to 3"),
        (AttentionConfig(heads={2: 1}), "keeps heads 0, 3"),
    ):
        with pytest.raises(UsageError, match=words):
            layer_pairs(settings, specs, teacher_layers=30, student_layers=4)
    with pytest.raises(UsageError, match="head 9 of the student"):
        loss_of(student_of("Llama"), {1: made_up_spec()}, AttentionConfig(heads={3: 9}))


def test_an_attention_of_another_kind_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4))
    with pytest.raises(UsageError, match="none whose maps"):
        loss_of(model, {1: made_up_spec()})
