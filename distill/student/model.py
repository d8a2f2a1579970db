"""A model folder, an adapter and a configuration flow in; a student with hidden states and a head flows out.

``B`` sequences, ``S`` padded length, ``N`` trained tokens, ``D`` hidden size, ``V`` real vocabulary.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from distill.config import TrainConfig
from distill.errors import IdentityError, UsageError
from distill.student.adapter import refuse_other_base, refuse_other_lora, with_adapter, with_new_adapter
from distill.student.batch import DistillBatch
from distill.student.losses.fused import Head, chunks_of_logits
from distill.student.merge import columns_of, merged, refuse_unmerged
from distill.student.precision import Precision
from distill.student.quantised import loading_options
from distill.student.ranks import ALONE, Ranks
from distill.student.sharding import gathered, is_sharded, shard, wants_sharding, whole
from distill.student.shrink import find_layers

_LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, SafetensorError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a student's weights come from: a plain transformers folder or hub name, and a LoRA adapter on top of it.

    ``base_weights`` is the hash of the base's weights that the adapter was trained on, where that is known.
    """

    base: str
    adapter: Path | None = None
    base_weights: str | None = None


class Student:
    """A causal language model whose forward pass stops before the logits.

    Where its weights are spread over ranks, all ranks must call ``hidden``, ``head`` and ``weights`` together.
    """

    def __init__(self, model: Any, *, head: Head, precision: Precision) -> None:
        self.model = model  # a transformers model, or peft's wrapper of one
        self.precision = precision
        self._head = head
        self._decoder = causal_of(model).base_model
        # FSDP puts gathered weights in place of sharded ones for a while: the latter are kept here.
        self._named = dict(model.named_parameters())
        self._inputs: dict[int, Tensor] = {}  # of watched layers, [B, S, D], in the latest ``hidden``
        self._keeps_inputs = False  # recomputing a layer in the backward pass calls its hooks once more

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds only a part of the weights."""
        return is_sharded(self._head.weight)

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self._head.weight.shape[1])

    @property
    def num_layers(self) -> int:
        """Layers of the decoder."""
        return int(causal_of(self.model).config.get_text_config().num_hidden_layers)

    def hidden(self, batch: DistillBatch) -> Tensor:
        """Final hidden states of the batch's trained tokens, after the last norm: [N, D]."""
        # A mask of padding alone would let packed sequences attend to each other; position ids tell them apart.
        mask = batch.attention_mask if batch.position_ids is None else None
        self._inputs, self._keeps_inputs = {}, True
        states_BSD = self._states(batch.input_ids, mask, batch.position_ids)
        self._keeps_inputs = False
        return states_BSD.flatten(0, 1).index_select(0, batch.trained)

    def watch(self, layers: Iterable[int]) -> None:
        """Let ``hidden`` keep what goes into these layers. Raises UsageError for a model whose layers are not found."""
        found = find_layers(self._decoder, self.num_layers)
        if found is None:
            raise UsageError(
                f"no list of {self.num_layers} layers was found in {type(self._decoder).__name__}, so its inner states "
                "cannot be compared with the teacher's. Set feature.layers to none, or use another student."
            )
        for layer in layers:
            # Before FSDP's own hooks: the loss then hangs on the layer before, as any user of its output does.
            hook = self._keeper(layer)
            getattr(*found)[layer].register_forward_pre_hook(hook, prepend=True, with_kwargs=True)

    def _keeper(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def keep(_module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            if self._keeps_inputs:
                self._inputs[layer] = arguments[0] if arguments else options["hidden_states"]

        return keep

    def take_inputs(self, batch: DistillBatch) -> dict[int, Tensor]:
        """What went into each watched layer at the trained tokens of ``batch`` in the latest ``hidden``: [N, D]."""
        inputs, self._inputs = self._inputs, {}
        return {layer: kept.flatten(0, 1).index_select(0, batch.trained) for layer, kept in inputs.items()}

    def _states(
        self, input_ids_BS: Tensor, attention_mask_BS: Tensor | None = None, position_ids_BS: Tensor | None = None
    ) -> Tensor:
        with self.precision.context():
            output = self._decoder(
                input_ids=input_ids_BS, attention_mask=attention_mask_BS, position_ids=position_ids_BS, use_cache=False
            )
        states_BSD: Tensor = output.last_hidden_state
        return states_BSD

    @torch.no_grad()
    def check_packing(self) -> None:
        """Raise UsageError unless sequences that share a row keep the states that each has alone."""
        was_training = self.model.training
        self.model.eval()
        device = self.precision.device
        ids_BS = torch.arange(32, device=device).remainder(self._head.vocab_size).view(4, 8)
        alone_BSD = self._states(ids_BS)
        # Two rows, since an attention kernel may tell packed sequences apart in a batch of one row alone.
        together_BSD = self._states(ids_BS.view(2, 16), None, torch.arange(8, device=device).repeat(2, 2))
        self.model.train(was_training)
        error = (together_BSD.view_as(alone_BSD) - alone_BSD).float().norm() / alone_BSD.float().norm()
        if not error <= 0.02:
            raise UsageError(
                f"{type(causal_of(self.model)).__name__} lets packed sequences attend to each other: their states "
                f"differ by {error:.0%} from those of each alone. Set packing to false."
            )

    def head(self) -> Head:
        """The LM head; its weight is the live parameter, or gathered from all ranks and still part of the graph."""
        if not self.is_sharded:
            return self._head
        bias = None if self._head.bias is None else gathered(self._head.bias)
        return replace(self._head, weight=gathered(self._head.weight), bias=bias)

    def weights(self, *, keep: bool = True) -> dict[str, Tensor] | None:
        """The whole weights that ``save`` writes, on the CPU; None where the model has them itself.

        A rank that does not ``keep`` them gets nothing.
        """
        if not self.is_sharded:
            return None
        adapted = hasattr(self.model, "peft_config")
        found = {}
        for name, value in self._named.items():
            if value.requires_grad or not adapted:
                complete = whole(value)
                if keep:
                    found[name] = complete
        return found

    def save(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write the model, or the adapter alone where there is one, as safetensors and JSON."""
        adapter = {"save_embedding_layers": False} if hasattr(self.model, "peft_config") else {}
        given = {} if weights is None else {"state_dict": weights}
        self.model.save_pretrained(folder, **adapter, **given)

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters that the optimizer trains."""
        return [(name, value) for name, value in self._named.items() if value.requires_grad]

    def shared(self) -> list[nn.Parameter]:
        """Trained parameters whose gradients tell losses apart: adapters, or else the last layer, or else all."""
        found = None if hasattr(self.model, "peft_config") else find_layers(self._decoder, self.num_layers)
        if found is None:
            return [value for _, value in self.trainable()]
        names = {name for name, module in self.model.named_modules() if module is getattr(*found)[-1]}
        return [value for name, value in self.trainable() if any(name.startswith(f"{last}.") for last in names)]


def causal_of(model: Any) -> Any:
    """The transformers model inside peft's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def load_student(
    config: TrainConfig,
    origin: Origin,
    *,
    precision: Precision,
    vocab_size: int,
    training: bool,
    ranks: Ranks = ALONE,
) -> Student:
    """The student at ``origin`` on its device, ready to train what ``config.tune`` says, or to be evaluated.

    In training its weights are spread over ``ranks`` where ``config.parallel`` says so. Raises UsageError for a model
    that is missing, has no safetensors, or changes its logits in an unknown way, and for an adapter that is not what
    ``config.lora`` asks for; IdentityError when its head has fewer rows than the cache has ids, or when an adapter's
    base has changed.
    """
    _check_config(origin.base, vocab_size, config, training=training)
    full = training and config.tune == "full"
    dtype = torch.float32 if full else precision.compute_dtype
    options = loading_options(config, precision.device, precision.compute_dtype) if training else {}
    model = load_causal(origin.base, dtype=dtype, trust_remote_code=config.trust_remote_code, **options)
    sharded = training and wants_sharding(config, model, precision, ranks)
    if origin.adapter is not None:
        base, adapter, expected = origin.base, origin.adapter, origin.base_weights
        ranks.first(lambda: refuse_other_base(base, adapter, expected))
        model = with_adapter(model, origin.adapter, trainable=training and not full)
        if training and not full:
            refuse_other_lora(model, origin.adapter, config.lora)
        if full:
            adapted = columns_of(model)
            model = merged(model, origin.adapter)
            refuse_unmerged(model, adapted, origin.adapter)
    elif training and not full:
        model = with_new_adapter(model, config.lora)
    if not sharded and not options:  # a sharded one reaches its device in parts, a quantised one is there
        model.to(precision.device)
    head = _head_of(causal_of(model), vocab_size, precision)
    _check_head(causal_of(model), head)
    if full or not training:
        model.requires_grad_(full)
    if training and config.gradient_checkpointing:
        causal_of(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train(training)
    if sharded:
        causal = causal_of(model)
        shard(causal, causal.base_model, precision, ranks)
        projection = causal.get_output_embeddings()
        head = replace(head, weight=projection.weight, bias=projection.bias)
    student = Student(model, head=head, precision=precision)
    if training and config.packing:
        student.check_packing()
    return student


def load_causal(base: str, *, dtype: torch.dtype | str, trust_remote_code: bool, **options: Any) -> Any:
    """A causal language model from safetensors that can be saved again; nothing is unpickled.

    ``options`` go to transformers. Raises UsageError when it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except _LOADING_ERRORS as error:
        raise _cannot_load(base, error) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UsageError(
            f"the weights of {base} lack {len(missing)} parameters, {missing[0]} among them, which would be random. "
            "Use a complete model folder."
        )
    _settle_generation(model)
    return model


def _settle_generation(model: Any) -> None:
    """Keep a contradictory generation_config.json, which transformers loads, from being refused when it is saved.

    Many models advise a temperature and say that nothing is to be drawn. The ids that end an answer are kept.
    """
    from transformers import GenerationConfig

    given = model.generation_config  # None for some models that bring code of their own
    try:
        if given is not None:
            given.validate(strict=True)
    except ValueError:
        kept = {name: getattr(given, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**kept)


def _cannot_load(base: str, error: Exception) -> UsageError:
    reason = str(error).partition("\n")[0].rstrip(". ")
    return UsageError(
        f"cannot load the model {base}: {reason}. It must be a folder or hub name of a causal language model with "
        "safetensors weights; pickled weights are never loaded. Check --student and --from."
    )


def _check_config(base: str, vocab_size: int, config: TrainConfig, *, training: bool) -> None:
    """The checks that need no weights."""
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(base, trust_remote_code=config.trust_remote_code).get_text_config()
    except _LOADING_ERRORS as error:
        raise _cannot_load(base, error) from error
    if training and config.student_layers not in (None, found.num_hidden_layers):
        raise UsageError(
            f"student_layers is {config.student_layers}, but the model to begin from, {base}, has "
            f"{found.num_hidden_layers} layers. Only --student itself is made smaller: leave --from or student_layers "
            "away."
        )
    if found.vocab_size < vocab_size:
        raise IdentityError(
            f"the head of {base} has {found.vocab_size} rows, but the cache has targets for {vocab_size} ids. Use a "
            "student whose embedding covers its whole tokenizer (transformers: resize_token_embeddings)."
        )


def _head_of(model: Any, vocab_size: int, precision: Precision) -> Head:
    """The head, once adapters are in place: the losses, which use its weight alone, would pass over one on it."""
    projection = model.get_output_embeddings()
    if not isinstance(projection, nn.Linear) or model.base_model is model:
        raise UsageError(
            f"{type(model).__name__} has no plain linear LM head on a decoder of its own, without an adapter, which "
            "the losses need. Use another student, or make a plain model of the adapter with `distill export`."
        )
    config = model.config.get_text_config()
    return Head(
        weight=projection.weight,
        bias=projection.bias,
        vocab_size=vocab_size,
        scale=_logit_scale(config),
        soft_cap=getattr(config, "final_logit_softcapping", None),
        compute_dtype=precision.compute_dtype,
    )


def _logit_scale(config: Any) -> float:
    if getattr(config, "logits_scaling", None):
        return 1.0 / float(config.logits_scaling)  # Granite divides
    return float(getattr(config, "logit_scale", None) or 1.0)  # Cohere multiplies


@torch.no_grad()
def _check_head(model: Any, head: Head) -> None:
    """Compare our logits with the model's own on a few tokens, since a model may do more to them than we know of."""
    device = head.weight.device
    ids_BS = torch.arange(8, device=device).remainder(head.vocab_size).unsqueeze(0)
    model.eval()
    own_NV = model(input_ids=ids_BS, use_cache=False).logits[0, :, : head.vocab_size].float()
    states_ND = model.base_model(input_ids=ids_BS, use_cache=False).last_hidden_state[0]
    (_, _, raw_NV), *_ = chunks_of_logits(states_ND, head, head.matrix(), chunk=len(states_ND))
    error = (head.finish(raw_NV) - own_NV).abs().max()
    if not error <= 0.02 * own_NV.abs().max() + 1e-4:
        raise UsageError(
            f"{type(model).__name__} does something to its logits that distill does not know of: they differ by up to "
            f"{error:.3g} from head times hidden state. Use another student."
        )
