"""Sequences hold the teacher's exact tokens, train the assistant's words only, and account for every input row."""

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.config import CacheConfig
from distill.data.prompts import PromptMaker, prompts_of
from distill.data.sources import Source, open_sources
from distill.errors import DataError
from distill.records import Prompt, Reject

Configure = Callable[..., CacheConfig]
Write = Callable[..., Path]
Run = Callable[..., list[Prompt | Reject]]

MEDICAL = {
    "question": "What is anaemia?",
    "answer": "Too little haemoglobin: 血红蛋白不足 🩸.",
    "department": "haematology",
}


@pytest.fixture
def run(write_jsonl: Write, make_config: Configure) -> Run:
    """All that becomes of some rows (or of a file) with a tokenizer and configuration keys."""

    def run_it(tokenizer: Any, rows: list[dict[str, Any]] | Path, **keys: Any) -> list[Prompt | Reject]:
        config = make_config(rows if isinstance(rows, Path) else write_jsonl(rows), **keys)
        maker = PromptMaker(tokenizer, config=config)
        (source,) = open_sources(config)
        return list(prompts_of(source, start=0, stop=len(source), maker=maker))

    return run_it


def only_prompts(items: list[Prompt | Reject]) -> list[Prompt]:
    prompts = [item for item in items if isinstance(item, Prompt)]
    assert len(prompts) == len(items), items
    return prompts


def trained_text(tokenizer: Any, prompt: Prompt) -> str:
    return str(tokenizer.decode(prompt.input_ids[1:][prompt.loss_mask]))


@pytest.mark.parametrize("name", ["qwen", "smollm2"])
def test_masked_tokens_decode_to_the_answer(name: str, run: Run, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    (prompt,) = only_prompts(run(tokenizer, [MEDICAL]))
    messages = [
        {"role": "user", "content": MEDICAL["question"]},
        {"role": "assistant", "content": MEDICAL["answer"]},
    ]
    assert trained_text(tokenizer, prompt) == MEDICAL["answer"] + "<|im_end|>"
    expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert prompt.input_ids.tolist() == expected
    assert prompt.input_ids.dtype == np.int32
    assert prompt.loss_mask.dtype == np.bool_
    assert len(prompt.loss_mask) == len(prompt.input_ids) - 1
    assert (prompt.prompt, prompt.response) == (MEDICAL["question"], MEDICAL["answer"])
    assert prompt.metadata == {"department": "haematology"}
    assert (prompt.domain, prompt.source) == ("general", "rows.jsonl:1")


@pytest.mark.parametrize("name", ["qwen", "smollm2"])
def test_every_answer_of_a_conversation_trains(name: str, run: Run, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    contents = ["Be brief.", "Hi", "Hello. ", "How?", "<think>\nhm\n</think>\n\nSo."]
    roles = ["system", "user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    (prompt,) = only_prompts(run(tokenizer, [{"messages": messages}]))
    assert trained_text(tokenizer, prompt) == "Hello. <|im_end|><think>\nhm\n</think>\n\nSo.<|im_end|>"
    assert prompt.input_ids.tolist() == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert prompt.response == contents[-1]
    assert prompt.prompt == "system: Be brief.\n\nuser: Hi\n\nassistant: Hello. \n\nuser: How?"


def test_what_tools_say_is_read_and_not_learnt(qwen: Any, run: Run) -> None:
    calls = [{"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}]
    messages = [
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "12:00"},
        {"role": "assistant", "content": "Noon."},
    ]
    (whole, asked) = only_prompts(run(qwen, [{"messages": messages}, {"messages": messages[:2]}]))
    call = '<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call><|im_end|>'
    assert trained_text(qwen, whole) == call + "Noon.<|im_end|>"
    assert "12:00" in qwen.decode(whole.input_ids)
    assert json.loads(asked.response) == calls
    assert json.loads(whole.prompt.split("\n\n")[1].removeprefix("assistant: ")) == calls


def test_a_token_that_joins_the_template_and_the_answer_trains(smollm2: Any, run: Run) -> None:
    smollm2.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}<|im_end|>"
    (prompt,) = only_prompts(run(smollm2, [{"question": "Hi?", "answer": "Yo"}]))
    assert trained_text(smollm2, prompt) == " Yo<|im_end|>"


def test_plain_text_trains_whole(qwen: Any, run: Run) -> None:
    (prompt,) = only_prompts(run(qwen, [{"text": "The heart pumps blood.", "url": "u"}]))
    assert qwen.decode(prompt.input_ids) == "The heart pumps blood.<|im_end|>"
    assert prompt.loss_mask.all()
    assert (prompt.prompt, prompt.response) == ("", "The heart pumps blood.")
    assert prompt.metadata == {"url": "u"}


def test_plain_text_begins_and_ends_as_the_tokenizer_does(run: Run) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "?": 4}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    with_bos = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    without_eos = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")
    rows = [{"text": "a b a"}]
    assert only_prompts(run(with_bos, rows))[0].input_ids.tolist() == [0, 2, 3, 2, 1]
    assert only_prompts(run(without_eos, rows))[0].input_ids.tolist() == [0, 2, 3, 2]
    assert run(with_bos, [{"text": "a </s>"}])[0].input_ids.tolist() == [0, 2, 1]
    words.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    bare = PreTrainedTokenizerFast(tokenizer_object=words)
    (reject,) = run(bare, [{"text": "a"}])
    assert isinstance(reject, Reject)
    assert reject.reason == "fewer than 2 tokens"


def test_chat_data_needs_a_template(qwen: Any, run: Run) -> None:
    qwen.chat_template = None
    assert only_prompts(run(qwen, [{"text": "Plain text needs none."}]))
    with pytest.raises(DataError, match="no chat template"):
        run(qwen, [MEDICAL])


def test_a_check_before_any_row(qwen: Any, write_jsonl: Write, make_config: Configure) -> None:
    config = make_config(write_jsonl([MEDICAL]))
    qwen.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        PromptMaker(qwen, config=config).check(open_sources(config)[0])


def test_rejected_rows_say_where_and_why(smollm2: Any, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\nbroken\n{"question": "q", "answer": ""}\n')
    first, *rejects = run(smollm2, path)
    assert isinstance(first, Prompt)
    assert [(item.domain, item.source) for item in rejects] == [("general", "f.jsonl:2"), ("general", "f.jsonl:3")]
    assert isinstance(rejects[0], Reject)
    assert rejects[0].reason.startswith("not JSON")
    assert rejects[1] == Reject(domain="general", source="f.jsonl:3", reason="column 'answer' is empty")


WORDS = "one two three four five six seven eight nine ten eleven twelve"


def test_truncate(smollm2: Any, run: Run) -> None:
    rows = [{"question": "Count.", "answer": WORDS}]
    (whole,) = only_prompts(run(smollm2, rows))
    limit = len(whole.input_ids) - 5
    (cut,) = only_prompts(run(smollm2, rows, max_length=limit))
    assert cut.input_ids.tolist() == whole.input_ids[:limit].tolist()
    assert cut.loss_mask.tolist() == whole.loss_mask[: limit - 1].tolist()
    assert cut.source == "rows.jsonl:1"
    assert cut.response == trained_text(smollm2, cut)
    assert WORDS.startswith(cut.response)
    assert cut.prompt == "Count."
    assert cut.prompt_id == whole.prompt_id
    assert cut.sequence_id != whole.sequence_id
    (reject,) = run(smollm2, rows, max_length=10)
    assert isinstance(reject, Reject)
    assert "none of the assistant's words is within the 10 tokens" in reject.reason


def test_reject(smollm2: Any, run: Run) -> None:
    rows = [{"question": "Count.", "answer": WORDS}, {"question": "Count.", "answer": "one"}]
    (long, short) = only_prompts(run(smollm2, rows))
    rejected, kept = run(smollm2, rows, max_length=len(short.input_ids), overlong="reject")
    assert isinstance(kept, Prompt)
    assert isinstance(rejected, Reject)
    lengths = len(short.input_ids), len(long.input_ids)
    assert rejected.reason == "longer than the {} tokens of --max-length: {}".format(*lengths)


@pytest.mark.parametrize("max_length", [2, 3, 7, 41, 42, 43])
def test_split_loses_no_target(smollm2: Any, run: Run, max_length: int) -> None:
    rows = [{"question": "Count.", "answer": WORDS}]
    (whole,) = only_prompts(run(smollm2, rows))
    items = run(smollm2, rows, max_length=max_length, overlong="split")
    pieces = [item for item in items if isinstance(item, Prompt)]
    assert all(2 <= len(piece.input_ids) <= max_length for piece in pieces)
    assert {piece.prompt_id for piece in pieces} == {whole.prompt_id}
    targets = np.concatenate([piece.input_ids[1:][piece.loss_mask] for piece in pieces])
    assert targets.tolist() == whole.input_ids[1:][whole.loss_mask].tolist()
    if len(items) > 1:
        assert [item.source for item in items] == [f"rows.jsonl:1#{number}" for number in range(1, len(items) + 1)]
        assert "".join(piece.response for piece in pieces) == WORDS
        assert len({piece.sequence_id for piece in pieces}) == len(pieces)
    else:
        assert items[0].source == "rows.jsonl:1"


def test_split_of_plain_text(smollm2: Any, run: Run) -> None:
    pieces = only_prompts(run(smollm2, [{"text": WORDS}], max_length=5, overlong="split"))
    assert len(pieces) == 3
    joined = np.concatenate([pieces[0].input_ids, *(piece.input_ids[1:] for piece in pieces[1:])])
    assert smollm2.decode(joined) == WORDS + "<|im_end|>"
    assert pieces[2].response == " ten eleven twelve"


def test_ids(smollm2: Any, run: Run) -> None:
    rows = [
        {"question": "q", "answer": "a"},
        {"question": "q", "answer": "b"},
        {"question": "p", "answer": "a"},
        {"question": "q", "answer": "a", "department": "x"},
    ]
    one, two, three, again = only_prompts(run(smollm2, rows))
    assert one.prompt_id == two.prompt_id == again.prompt_id != three.prompt_id
    assert one.sequence_id == again.sequence_id
    assert len({one.sequence_id, two.sequence_id, three.sequence_id}) == 3
    assert all(len(item.prompt_id) == len(item.sequence_id) == 32 for item in (one, two, three))
    # Caches hold them, so how they are made must not change: little-endian int32 ids, then one byte for each target.
    tokens = struct.pack(f"<{len(one.input_ids)}i", *one.input_ids)
    num_prompt = one.loss_mask.tolist().index(True) + 1
    assert one.prompt_id == hashlib.sha256(tokens[: 4 * num_prompt]).hexdigest()[:32]
    assert one.sequence_id == hashlib.sha256(tokens + bytes(one.loss_mask.tolist())).hexdigest()[:32]


def sides(items: list[Prompt | Reject]) -> dict[str, str]:
    return {item.prompt: item.split for item in only_prompts(items)}


def test_held_out_rows_depend_on_their_prompt_alone(smollm2: Any, run: Run) -> None:
    rows = [{"question": f"question {number}", "answer": "a"} for number in range(300)]
    tenth = sides(run(smollm2, rows, eval_fraction=0.1))
    held = {prompt for prompt, split in tenth.items() if split == "eval"}
    assert 15 <= len(held) <= 45
    reordered = [{**row, "answer": "another"} for row in reversed(rows[100:])]
    assert sides(run(smollm2, reordered, eval_fraction=0.1)).items() <= tenth.items()
    fifth = sides(run(smollm2, rows, eval_fraction=0.2))
    assert held < {prompt for prompt, split in fifth.items() if split == "eval"}
    assert set(sides(run(smollm2, rows, eval_fraction=0.0)).values()) == {"train"}


def test_plain_texts_that_begin_alike_are_not_held_out_together(smollm2: Any, run: Run) -> None:
    rows = [{"text": f"The text {number}"} for number in range(100)]
    splits = [prompt.split for prompt in only_prompts(run(smollm2, rows, eval_fraction=0.5))]
    assert 25 < splits.count("eval") < 75


def test_eval_files_keep_all_data_for_training(smollm2: Any, write_jsonl: Write) -> None:
    rows = [{"question": f"question {number}", "answer": "a"} for number in range(20)]
    config = CacheConfig(
        teacher="t",
        out="o",
        data={"general": (str(write_jsonl(rows)),)},
        eval={"general": (str(write_jsonl(rows[:5], "held.jsonl")),)},
        eval_fraction=0.9,
    )
    maker = PromptMaker(smollm2, config=config)
    found: list[tuple[str, str]] = []
    for source in open_sources(config):
        found += [(source.name, p.split) for p in only_prompts(list(prompts_of(source, start=0, stop=50, maker=maker)))]
    assert found == [("rows.jsonl", "train")] * 20 + [("held.jsonl", "eval")] * 5


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), overlong=st.sampled_from(["truncate", "reject", "split"]))
def test_ok_and_rejects_are_the_input(
    shared_smollm2: Any,
    tmp_path_factory: pytest.TempPathFactory,
    make_config: Configure,
    data: st.DataObject,
    overlong: str,
) -> None:
    rows = [{"question": f"q{n}", "answer": data.draw(st.text(max_size=60))} for n in range(4)]
    content = bytearray("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    for _ in range(data.draw(st.integers(0, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        mangled = data.draw(st.sampled_from([b"", b"\n", b"\x00", b"\xff", b'"', b"\\ud800", "\u2028".encode()]))
        content[position : position + data.draw(st.integers(0, 3))] = mangled
    content[:0] = b'{"question": "good", "answer": "row"}\n'
    path = tmp_path_factory.mktemp("mangled") / "f.jsonl"
    path.write_bytes(bytes(content))
    config = make_config(path, overlong=overlong, max_length=40)
    (source,) = open_sources(config)
    maker = PromptMaker(shared_smollm2, config=config)
    items = [
        item
        for start in range(0, len(source), 2)
        for item in prompts_of(source, start=start, stop=start + 2, maker=maker)
    ]
    lines = [number for number, line in enumerate(content.split(b"\n"), start=1) if line.strip(b" \t\r")]
    assert list(dict.fromkeys(int(item.source.split(":")[1].split("#")[0]) for item in items)) == lines
    if overlong != "split":
        assert len(items) == len(lines)


def test_every_format_gives_the_same_sequences(smollm2: Any, run: Run, write_jsonl: Write, tmp_path: Path) -> None:
    import gzip

    import pandas as pd
    import pyarrow as pa

    rows = [{**MEDICAL, "answer": f'answer, "{number}"\nsecond line\u2028'} for number in range(3)]
    frame = pd.DataFrame(rows)
    plain = write_jsonl(rows)
    frame.to_csv(tmp_path / "rows.csv", index=False)
    frame.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress((tmp_path / "rows.csv").read_bytes()))
    with pa.CompressedOutputStream(str(tmp_path / "rows.json.zst"), "zstd") as stream:
        stream.write(plain.read_bytes())
    expected = [prompt.sequence_id for prompt in only_prompts(run(smollm2, plain))]
    numbers = {"rows.csv": [2, 4, 6], "rows.csv.gz": [2, 4, 6], "rows.json.zst": [1, 2, 3], "rows.parquet": [0, 1, 2]}
    for name, rows_at in numbers.items():
        prompts = only_prompts(run(smollm2, tmp_path / name))
        assert [prompt.sequence_id for prompt in prompts] == expected
        assert [prompt.source for prompt in prompts] == [f"{name}:{row}" for row in rows_at]
        assert prompts[0].metadata == {"department": "haematology"}


def test_source_and_maker_serve_any_range(smollm2: Any, write_jsonl: Write, make_config: Configure) -> None:
    config = make_config(write_jsonl([{"question": f"q{n}", "answer": "a"} for n in range(10)]))
    maker = PromptMaker(smollm2, config=config)
    source: Source = open_sources(config)[0]
    items = only_prompts(list(prompts_of(source, start=3, stop=6, maker=maker)))
    assert [item.prompt for item in items] == ["q3", "q4", "q5"]
