"""What a training step on a cache costs: ``python -m benchmarks.step [--repeats 5] [--tokens 512] [--json FILE]``.

Steps of the same student in turn, forward, backward and AdamW, KL + CE: on a cache (k = 64, low-rank tail of 128
bytes); on hard labels with the same chunked head, and as transformers computes it; and with the teacher in memory, once
as most scripts do it (``online``: both models' dense logits from transformers' own forward pass, ``F.kl_div``) and once
with the teacher's whole distribution through our fused loss (``online_fused``). ``deep`` is a random student whose LM
head is 8% of its work, as in a 7B; ``small`` is SmolLM2-135M with four layers, whose head is two thirds of it, all of
its weights trained; ``adapters`` is the same with LoRA, as the trainer does by default. The ratios to ``online`` at the
top are those of ``adapters``. Without SmolLM2 (it is converted from a package of the demo) only ``deep`` is measured.

Time is CPU time of one thread, which other work on the machine hardly changes. Memory is the peak of a process that
takes two steps, less what it held once everything was imported.
"""

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Variant = Literal["cached", "ce", "transformers", "online", "online_fused"]
TOP_K, RANK, LENGTH, CHUNK = 64, 352, 128, 256
KL_WEIGHT, CE_WEIGHT, TEMPERATURE = 0.7, 0.3, 2.0
DEEP = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "tie_word_embeddings": False,
}
VARIANTS: dict[str, tuple[Variant, ...]] = {
    "deep": ("cached", "ce", "transformers"),
    "small": ("cached", "ce", "transformers", "online", "online_fused"),
    "adapters": ("cached", "ce", "transformers", "online", "online_fused"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Student:
    """A model that trains, with its optimizer, and a teacher for the online variants."""

    model: Any
    optimizer: Any
    teacher: Any
    precision: str

    @property
    def flops(self) -> dict[str, float]:
        """For each token: of the layers and of the head, forward and backward, and of rebuilding the tail.

        A weight costs two for its product, two for its input's gradient, and two for its own where it is trained.
        """
        head = self.model.get_output_embeddings().weight
        weights = {weight for weight in self.model.parameters() if weight.ndim == 2}
        layers = weights - {head, self.model.get_input_embeddings().weight}
        price = {weight: weight.numel() * (6.0 if weight.requires_grad else 4.0) for weight in weights}
        return {
            "layers": sum(price[weight] for weight in layers),
            "head": price[head],
            "tail": 2.0 * RANK * len(head),
        }

    @property
    def body(self) -> Any:
        """What comes before the LM head; an adapter works inside of it."""
        return self.model.get_base_model().model if hasattr(self.model, "get_base_model") else self.model.model


def load(name: str, variant: Variant, precision: str) -> Student:
    """The student of a size; the teacher only where the variant needs it."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    from distill.config import LoraConfig
    from distill.student.adapter import with_new_adapter
    from distill.student.shrink import keep_layers

    logging.disable_progress_bar()
    torch.manual_seed(0)
    teacher = None
    if name == "deep":
        model = LlamaForCausalLM(LlamaConfig(**DEEP))
    else:
        from examples.smollm2 import teacher_folder

        model = AutoModelForCausalLM.from_pretrained(teacher_folder(), dtype=torch.float32)
        keep_layers(model, 4)
        if variant.startswith("online"):
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            teacher = AutoModelForCausalLM.from_pretrained(teacher_folder(), dtype=dtype)
    if name == "adapters":
        model = with_new_adapter(model, LoraConfig())
    gc.collect()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Student(model=model, optimizer=torch.optim.AdamW(trained), teacher=teacher, precision=precision)


def batch_of(vocab_size: int, num_tokens: int, precision: str) -> tuple[Any, Any, Any]:
    """Input ids [B, S], made-up targets of their positions, and the tail that they share."""
    import torch

    from distill.student.losses.fused import HeadTargets
    from distill.student.losses.kl import TeacherTargets
    from distill.student.losses.tail import TailModel

    generator = torch.Generator().manual_seed(1)
    ids_BS = torch.randint(0, vocab_size, (num_tokens // LENGTH, LENGTH), generator=generator)
    first_N1 = torch.randint(0, vocab_size - 97 * TOP_K, (num_tokens, 1), generator=generator)
    teacher = TeacherTargets(
        topk_ids=first_N1 + 97 * torch.arange(TOP_K),
        topk_log_p=torch.linspace(-1.5, -7.5, TOP_K).expand(num_tokens, -1).contiguous(),
        log_tail=torch.full((num_tokens,), -1.0),
        temperature=TEMPERATURE,
    )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    basis_RV = 0.1 * torch.randn(RANK, vocab_size, generator=generator)
    tail = TailModel(basis=basis_RV.to(dtype), bias=torch.zeros(vocab_size), logit_scale=1.0, soft_cap=None)
    coords_NR = torch.randn(num_tokens, RANK, generator=generator)
    return ids_BS, HeadTargets(teacher=teacher, labels=first_N1[:, 0], coords=coords_NR, tail=tail), tail


def plain_loss(model: Any, teacher: Any, ids_BS: Any, labels_N: Any) -> Any:
    """What a distillation loop usually computes: KL with T² and cross-entropy on dense logits [N, V]."""
    import torch
    from torch.nn import functional

    with torch.no_grad():
        teacher_NV = teacher(input_ids=ids_BS, use_cache=False).logits.flatten(0, 1)
        teacher_NV = (teacher_NV / TEMPERATURE).log_softmax(-1)
    student_NV = model(input_ids=ids_BS, use_cache=False).logits.flatten(0, 1)
    softened_NV = (student_NV / TEMPERATURE).log_softmax(-1)
    kl = functional.kl_div(softened_NV, teacher_NV, log_target=True, reduction="batchmean") * TEMPERATURE**2
    return KL_WEIGHT * kl + CE_WEIGHT * functional.cross_entropy(student_NV, labels_N)


def stepper(student: Student, variant: Variant, num_tokens: int) -> Callable[[], None]:
    """A function that takes one optimizer step."""
    import torch

    from distill.student.losses.fused import Head, HeadTargets, fused_head_losses
    from distill.student.losses.kl import TeacherTargets
    from distill.student.losses.tail import TailModel

    model, weight = student.model, student.model.get_output_embeddings().weight
    dtype = torch.bfloat16 if student.precision == "bf16" else torch.float32
    ids_BS, targets, _ = batch_of(len(weight), num_tokens, student.precision)
    context = torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)
    head = Head(weight=weight, bias=None, vocab_size=len(weight), scale=1.0, soft_cap=None, compute_dtype=dtype)

    def in_memory(hidden_ND: Any) -> HeadTargets:
        """The teacher's whole distribution: a tail without a top-k."""
        with torch.no_grad():
            states = student.teacher.model(input_ids=ids_BS, use_cache=False).last_hidden_state.flatten(0, 1)
        basis = student.teacher.get_output_embeddings().weight.detach().T
        none = targets.teacher
        whole = TeacherTargets(
            topk_ids=none.topk_ids[:, :0],
            topk_log_p=none.topk_log_p[:, :0],
            log_tail=torch.zeros(len(hidden_ND)),
            temperature=TEMPERATURE,
        )
        tail = TailModel(basis=basis, bias=torch.zeros(basis.shape[1]), logit_scale=1.0, soft_cap=None)
        return HeadTargets(teacher=whole, labels=targets.labels, coords=states, tail=tail)

    def loss() -> Any:
        with context:
            if variant == "transformers":
                return model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss
            if variant == "online":
                return plain_loss(model, student.teacher, ids_BS, targets.labels)
            hidden_ND = student.body(input_ids=ids_BS, use_cache=False).last_hidden_state.flatten(0, 1)
        asked = in_memory(hidden_ND) if variant == "online_fused" else targets
        weights = (0.0, 1.0) if variant == "ce" else (KL_WEIGHT, CE_WEIGHT)
        losses = fused_head_losses(hidden_ND, head, asked, kl_weight=weights[0], ce_weight=weights[1], chunk=CHUNK)
        return losses.weighted / len(hidden_ND)

    def step() -> None:
        loss().backward()
        student.optimizer.step()
        student.optimizer.zero_grad(set_to_none=True)

    return step


def seconds(name: str, *, repeats: int, num_tokens: int, precision: str) -> dict[str, float]:
    """Median CPU seconds of a step of each variant; they take turns on one student."""
    student = load(name, "online" if "online" in VARIANTS[name] else "ce", precision)
    steps = {variant: stepper(student, variant, num_tokens) for variant in VARIANTS[name]}
    found: dict[str, list[float]] = {variant: [] for variant in steps}
    for turn in range(repeats + 1):
        for variant, step in steps.items():
            started = time.process_time()
            step()
            if turn:  # the first one compiles
                found[variant].append(time.process_time() - started)
    return {variant: statistics.median(values) for variant, values in found.items()}


def peak_bytes(name: str, variant: Variant, *, num_tokens: int, precision: str) -> int:
    """What two steps add to a process, at their peak."""
    import torch
    import transformers.models.llama.modeling_llama

    import distill.student.losses.fused
    import distill.student.shrink  # noqa: F401

    assert transformers.models.llama.modeling_llama is not None
    torch.set_num_threads(1)
    before = _high_water()
    step = stepper(load(name, variant, precision), variant, num_tokens)
    for _ in range(2):
        step()
    return _high_water() - before


def _high_water() -> int:
    """The most memory that this process has held, in bytes. ``ru_maxrss`` would count the process that started it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def peaks(name: str, *, num_tokens: int, precision: str) -> dict[str, int]:
    """``peak_bytes`` of each variant, each in a process of its own."""
    found = {}
    for variant in VARIANTS[name]:
        command = [sys.executable, "-m", "benchmarks.step", "--tokens", str(num_tokens), "--precision", precision]
        out = subprocess.run([*command, "--peak", name, variant], check=True, capture_output=True, text=True).stdout
        found[variant] = int(out.split()[-1])
    return found


def measure(name: str, *, repeats: int, num_tokens: int, precision: str) -> dict[str, Any]:
    """Times, peaks and their ratios for one student."""
    flops = load(name, "ce", precision).flops
    peak_of = peaks(name, num_tokens=num_tokens, precision=precision)
    time_of = seconds(name, repeats=repeats, num_tokens=num_tokens, precision=precision)
    print(name, "seconds", time_of, "peaks", peak_of, flush=True)
    plain = flops["layers"] + flops["head"]
    floor = (plain + flops["tail"]) / plain
    figures: dict[str, Any] = {
        "seconds": {variant: round(value, 4) for variant, value in time_of.items()},
        "peak_mb": {variant: round(value / 2**20, 1) for variant, value in peak_of.items()},
        "head_share_of_work": round(flops["head"] / plain, 4),
        "flop_floor": round(floor, 4),
        "step_over_ce_time": round(time_of["cached"] / time_of["ce"], 4),
        "step_over_floor": round(time_of["cached"] / time_of["ce"] / floor, 4),
        "step_over_ce_memory": round(peak_of["cached"] / peak_of["ce"], 4),
        "step_over_transformers_ce_time": round(time_of["cached"] / time_of["transformers"], 4),
        "step_over_transformers_ce_memory": round(peak_of["cached"] / peak_of["transformers"], 4),
    }
    for online in (variant for variant in time_of if variant.startswith("online")):
        figures[f"{online}_over_cached_time"] = round(time_of[online] / time_of["cached"], 4)
        figures[f"{online}_over_cached_memory"] = round(peak_of[online] / peak_of["cached"], 4)
    return figures


def main(given: Sequence[str] | None = None) -> None:
    """Prints the figures, and writes JSON where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=512, help=f"tokens of a step, a multiple of {LENGTH}")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--only", choices=list(VARIANTS))
    parser.add_argument("--peak", nargs=2, metavar=("SIZE", "VARIANT"), help="measure one peak in this process")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(given)
    options = {"num_tokens": arguments.tokens, "precision": arguments.precision}
    if arguments.peak:
        print(peak_bytes(*arguments.peak, **options))
        return
    import torch

    torch.set_num_threads(1)
    names = [arguments.only] if arguments.only else list(VARIANTS)
    results = {name: measure(name, repeats=arguments.repeats, **options) for name in names}
    if "adapters" in results:
        results |= {name: value for name, value in results["adapters"].items() if name.startswith("online")}
    results["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "threads": 1,
        "torch": torch.__version__,
        **options,
    }
    text = json.dumps(results, indent=2)
    print(text)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
