"""Protects the attention loss: both sides' maps against the models' own, value and gradient in float64, its floor.

Students whose attention works in some way of its own come out right or are refused, and are left as they were.
"""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from distill.cache.attention import AttentionSpec, dequantise, rebuild_map
from distill.config import AttentionConfig
from distill.errors import UsageError
from distill.student.attention import AttentionLoss, KeptHeads, SequenceHeads, layer_pairs
from distill.student.losses.attention import log_map, turned

LENGTH, HEADS, GROUPS, SIZE = 10, 4, 2, 8
FULL = ["sliding_attention", "full_attention", "sliding_attention"]
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": SIZE,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
ALL_HEADS = {head: head for head in range(HEADS)}


def student_of(family, *, attention="eager", **changes):
    """A small random model in float64, on attention that shows its maps."""
    import transformers

    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes}, attn_implementation=attention)
    return transformers.AutoModelForCausalLM.from_config(config).double().eval()


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
        ("Gemma2", {"sliding_window": 4, "attn_logit_softcapping": 3.0}),
        ("Mistral", {"sliding_window": 4}),  # a window in the configuration alone
        ("SmolLM3", {"no_rope_layers": [1, 0, 1]}),
        ("Cohere2", {"sliding_window": 4, "layer_types": FULL}),  # these layers know no positions
        ("Exaone4", {"sliding_window": 4, "layer_types": FULL}),
        ("Olmo2", {}),  # norms its heads together
        ("StableLm", {"qk_layernorm": True}),  # turns a part of each head
    ],
)
@pytest.mark.parametrize("measure", ["kl", "mse"])
def test_value_and_gradient_are_those_of_the_models_own_maps(family, changes, measure):
    """Means over heads; two sequences, one of them padded; only trained positions count."""
    model = student_of(family, **changes)
    spec = made_up_spec()
    loss = loss_of(model, {1: spec}, AttentionConfig(measure=measure))
    sequences, wholes = [], []
    seen = dataclasses.replace(spec, window=4) if family == "Mistral" else spec  # both sides' positions alone count
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
            maps_of(seen, whole).mean(0, keepdim=True)[:, item.positions],
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


def heads_of(teacher, ids_1S):
    """What a cache would keep of the teacher's layer 1: rounded queries and keys before the rotary embedding."""
    attention, kept = teacher.base_model.layers[1].self_attn, {}
    hooks = [
        projection.register_forward_hook(lambda _m, _a, output, name=name: kept.update({name: output[0]}))
        for name, projection in (("q", attention.q_proj), ("k", attention.k_proj))
    ]
    teacher.base_model(ids_1S, use_cache=False)
    for hook in hooks:
        hook.remove()
    scales = {name: x.detach().unflatten(1, (-1, SIZE)).abs().amax(2).clamp(min=1e-9) / 127 for name, x in kept.items()}
    rounded = {name: (x.unflatten(1, (-1, SIZE)) / scales[name][..., None]).round() for name, x in kept.items()}
    return KeptHeads(
        **{name: x.flatten(1).detach().numpy().astype(np.int8) for name, x in rounded.items()},
        **{f"{name}_scale": x.numpy().astype(np.float32) for name, x in scales.items()},
    )


def test_alone_it_takes_a_student_down_to_its_teachers_maps():
    """Queries and keys of one layer drawn anew; what int8 leaves is what the teacher itself gets."""
    teacher = student_of("Llama", initializer_range=0.2)
    student = copy.deepcopy(teacher)
    rotary, attention = teacher.base_model.rotary_emb, student.base_model.layers[1].self_attn
    plain = {"rope_factor": 1.0, "softmax_scale": SIZE**-0.5, "inv_freq": rotary.inv_freq.float().numpy()}
    spec = dataclasses.replace(made_up_spec(heads=tuple(ALL_HEADS), bias=False), **plain)
    ids_1S = torch.arange(LENGTH)[None]
    item = SequenceHeads(row=0, start=0, positions=torch.arange(LENGTH), layers={1: heads_of(teacher, ids_1S)})
    settings = AttentionConfig(heads=ALL_HEADS)

    def value(model, loss):
        model.base_model(ids_1S, use_cache=False)
        return loss([item]) / LENGTH

    floor = value(teacher, loss_of(teacher, {1: spec}, settings)).item()
    weights = [attention.q_proj.weight, attention.k_proj.weight]
    for weight in weights:
        torch.nn.init.normal_(weight, std=0.2)
    loss, optimizer = loss_of(student, {1: spec}, settings), torch.optim.Adam(weights, lr=0.02)
    values = []
    for _ in range(200):
        optimizer.zero_grad()
        values.append(value(student, loss))
        values[-1].backward()
        optimizer.step()
    assert floor < 1e-3
    assert values[0].item() > 0.1
    assert values[-1].item() < 0.01 * values[0].item() + floor


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


def tuned(model, *, dropout):
    """With adapters that change queries and keys."""
    settings = LoraConfig(r=4, lora_dropout=dropout, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    return get_peft_model(model, settings)


@pytest.mark.parametrize("recomputed", [False, True])
def test_dropout_of_an_adapter_falls_on_the_map_as_on_the_model(recomputed):
    """One mask for both, also where the backward pass computes the layer once more, which leaves nothing behind."""
    model, spec = tuned(student_of("Llama"), dropout=0.5), made_up_spec(heads=tuple(ALL_HEADS))
    causal = model.get_base_model()
    loss = loss_of(causal, {1: spec}, AttentionConfig(heads=ALL_HEADS))
    kept, whole = made_up_heads(spec, LENGTH, np.arange(LENGTH))
    item = SequenceHeads(row=0, start=0, positions=torch.arange(LENGTH), layers={1: kept})
    trained = [value for value in model.parameters() if value.requires_grad][:8]  # of layers 0 and 1
    model.train()
    torch.manual_seed(5)
    found = causal.base_model(input_ids=torch.arange(LENGTH)[None], use_cache=False, output_attentions=True)
    want = by_the_book(maps_of(spec, whole), found.attentions[1][0], "kl")
    expected = torch.autograd.grad(want, trained)
    if recomputed:
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(5)
    causal.base_model(input_ids=torch.arange(LENGTH)[None], use_cache=False)
    got = loss([item])
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    for one, other in zip(torch.autograd.grad(got, trained), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert loss._seen == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_student_is_left_as_it_was(dtype):
    """Its attention, windows, mode and results, with adapters and in half precision; no random number is drawn."""
    causal = student_of("Mistral", attention="sdpa", sliding_window=6).to(dtype)
    model = tuned(causal, dropout=0.5).train()
    ids_1S = torch.arange(LENGTH)[None]
    before, random, modes = causal.config.to_dict(), torch.get_rng_state(), [m.training for m in model.modules()]
    expected = causal.base_model(input_ids=ids_1S, use_cache=False).last_hidden_state
    torch.set_rng_state(random)
    loss_of(causal, {0: made_up_spec(), 1: made_up_spec()})
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(causal.base_model(input_ids=ids_1S, use_cache=False).last_hidden_state, expected)
    assert causal.config.to_dict() == before
    assert all(layer.self_attn.config is causal.config for layer in causal.base_model.layers)
    assert causal.config._attn_implementation == "sdpa"


def test_maps_that_are_not_the_students_own_are_refused():
    """A sink takes a share of every row; a chunk ends where no window does, however far beyond the probe."""
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48}
    with pytest.raises(UsageError, match=r"layer 1 of GptOssModel .* wrong by 0\.\d+ in total variation.*Pair other"):
        loss_of(student_of("GptOss", **experts).float(), {1: made_up_spec()})
    chunked = student_of("Llama4Text", attention_chunk_size=8192, no_rope_layers=[1, 1, 0], **experts).float()
    with pytest.raises(UsageError, match="maps of layer 0 and 1 of Llama4"):
        loss_of(chunked, {0: made_up_spec(), 1: made_up_spec()})
    loss_of(chunked, {2: made_up_spec()})


def test_what_a_probe_stumbles_over_is_refused_and_nothing_stays_changed(monkeypatch):
    model = student_of("Mistral", attention="sdpa", sliding_window=4096)

    def fails(*_arguments, **_options):
        raise RuntimeError("sizes differ")

    monkeypatch.setattr(model.base_model.layers[2].self_attn, "forward", fails)
    with pytest.raises(UsageError, match=r"layer 2 of MistralModel .* RuntimeError when a few tokens .* sizes differ"):
        loss_of(model, {2: made_up_spec()})
    assert (model.config._attn_implementation, model.config.sliding_window) == ("sdpa", 4096)
    hidden = torch.zeros(1, 12, 32, dtype=torch.float64)
    monkeypatch.setattr(model.base_model.layers[2].self_attn, "forward", lambda **_options: (hidden, None))
    with pytest.raises(UsageError, match="KeyError when a few tokens"):
        loss_of(model, {2: made_up_spec()})
