"""Models of `flashgau.models` as models of transformers: its files, `generate`, Trainer and adapters (LoRA) work."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    Cache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, MaskedLMOutput
from transformers.utils import can_return_tuple

from ...eager.common import VECTOR_BYTES
from ...models import CausalLM, Encoder, MaskedLM, ModelConfig, ModelState
from ...models.stack import Stack
from ...nn.biases import AlibiBias
from ...nn.initialise import STD, linear

_OWN = {field.name for field in fields(ModelConfig)} - {
    "tied",
    "checkpointing",
}  # which transformers has its own way for


class FlashGauConfig(PreTrainedConfig):
    """A `ModelConfig` for transformers.

    Args:
        causal: each token sees only itself and what came before. A model with a head has its own answer.
        tie_word_embeddings: the output matrix is the embedding; `tied` of a `ModelConfig`.
        kwargs: fields of `ModelConfig`, but `checkpointing`, for which transformers has a method; and those of
            `PreTrainedConfig`. hidden_size, num_hidden_layers and num_attention_heads are dim, depth and heads.

    Example:
        >>> from flashgau.integrations.transformers import FlashGauConfig
        >>> config = FlashGauConfig(kind="flash", dim=64, depth=2)
        >>> config.hidden_size, config.native().dim
        (64, 64)
    """

    model_type = "flashgau"
    attribute_map = {  # noqa: RUF012  # as in PreTrainedConfig
        "hidden_size": "dim",
        "num_hidden_layers": "depth",
        "num_attention_heads": "heads",
        "tied": "tie_word_embeddings",
    }

    def __init__(self, causal: bool = True, tie_word_embeddings: bool = True, **kwargs: Any) -> None:
        kwargs = {self.attribute_map.get(name, name): value for name, value in kwargs.items()}
        self.causal, self.tie_word_embeddings = causal, kwargs.pop("tie_word_embeddings", tie_word_embeddings)
        own = {name: kwargs.pop(name) for name in _OWN & kwargs.keys()}
        for name, value in ModelConfig.from_dict(own).to_dict().items():
            if name in _OWN:
                setattr(self, name, value)
        super().__init__(**kwargs)

    def native(self) -> ModelConfig:
        """The same for `flashgau.models`."""
        own = {name: getattr(self, name) for name in _OWN}
        return ModelConfig.from_dict({**own, "tied": self.tie_word_embeddings})


class FlashGauCache(Cache):
    """A `ModelState` as a cache of transformers, which models make for `generate` and write in place.

    Of "flash" and "mc-tfm++" it has a constant size. `copy.deepcopy` of it continues apart.

    Attributes:
        state: after the tokens so far; None before the first.
        columns: tokens so far, padding included.
    """

    is_compileable = False

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.state: ModelState | None = None
        self.columns = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far, padding included."""
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each row continue from another: for beam search."""
        if self.state is not None:
            self.state.reorder(beam_idx)

    def __deepcopy__(self, memo: Any) -> FlashGauCache:
        other = FlashGauCache()
        other.state, other.columns = None if self.state is None else self.state.clone(), self.columns
        return other

    def _refused(self, *_: Any, **__: Any) -> None:
        raise ValueError(
            "FlashGauCache: it has no keys and values to cut or repeat; expected `reorder_cache` or a copy"
        )

    update = crop = batch_repeat_interleave = batch_select_indices = _refused  # type: ignore[assignment]


class _Base(PreTrainedModel):
    """What all three have in common."""

    config_class = FlashGauConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FLASH", "GAU", "TransformerBlock"]  # noqa: RUF012
    _is_stateful = True  # no guesses of an assistant, which would have to be taken back

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers loads it, with weights in memory of their own, so that it is the saved model bit for bit.

        In a file they begin anywhere, and the last bits of a processor's products depend on that.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for x in (*model.parameters(), *model.buffers()):
            if type(x) in (nn.Parameter, Tensor) and x.device.type == "cpu" and x.data_ptr() % VECTOR_BYTES:
                x.data = x.data.clone()
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        """Begin as `flashgau.models` does, what a file lacks."""
        super()._init_weights(module)
        if isinstance(module, AlibiBias):  # which no file holds
            slopes = module.slopes
            slopes.copy_(AlibiBias(len(slopes), device=slopes.device).slopes)
        elif not isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)):
            start = {"g": 1.0, "beta": 0.0, "scale": self.config.dim**-0.5}
            for name, value in module.named_parameters(recurse=False):
                if name in start:
                    nn.init.constant_(value, start[name])
                else:
                    nn.init.normal_(value, std=STD)


class FlashGauModel(_Base):
    """The stack of a model, without a head: hidden vectors after the final norm.

    Args:
        config: the model; its `causal` says what a token sees.

    Example:
        >>> import torch
        >>> from flashgau.integrations.transformers import FlashGauConfig, FlashGauModel
        >>> model = FlashGauModel(FlashGauConfig(dim=32, depth=1, key_dim=16, chunk_size=16))
        >>> tuple(model(torch.randint(256, (2, 50))).last_hidden_state.shape)
        (2, 50, 32)
    """

    def __init__(self, config: FlashGauConfig) -> None:
        super().__init__(config)
        self.stack = Stack(config.native(), config.causal)
        self.post_init()

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether layers are recomputed in the backward pass; without reentrance, whatever transformers asks for."""
        return self.stack.config.checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.stack.config = replace(self.stack.config, checkpointing=value)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.stack.embedding

    def set_input_embeddings(self, value: Any) -> None:
        """Another embedding, which may have another number of tokens."""
        self.stack.embedding = value
        self.stack.config = replace(self.stack.config, vocab_size=value.weight.shape[0])

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: FlashGauCache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden vectors (B, N, d).

        Args:
            input_ids: (B, N); padding may be any of them.
            attention_mask: (B, N), or with the tokens before; 0 on the left or the right of a row is padding, and what
                a token gets does not depend on it.
            past_key_values: the cache of the tokens before. It is written in place.
            use_cache: return it, or a new one; None for no, but with `past_key_values`.
            kwargs: `return_dict`; others are refused unless None or False.
        """
        named = type(self).__name__
        if given := sorted(name for name, x in kwargs.items() if x is not None and x is not False):
            raise ValueError(f"{named}: got `{given[0]}`, which it cannot take or give; expected None")
        if input_ids is None:
            raise ValueError(f"{named}: `input_ids` is None; expected tokens (B, N)")
        if past_key_values is not None and not isinstance(past_key_values, FlashGauCache):
            kind = type(past_key_values).__name__
            raise TypeError(f"{named}: `past_key_values` is a {kind}; expected a FlashGauCache")
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        cached = past_key_values is not None or bool(use_cache and not recompute)
        cache = FlashGauCache() if cached and past_key_values is None else past_key_values
        state = None if cache is None else cache.state
        if state is None:
            self.stack.forget_copies()
        rows = None if attention_mask is None else _Rows.of(attention_mask, input_ids)
        hidden, after = self.stack(
            input_ids if rows is None else rows.begun(input_ids),
            lengths=None if rows is None else rows.lengths,
            state=state,
            return_state=cached,
            inplace=state is not None and not torch.is_grad_enabled(),
        )
        if rows is not None:
            hidden = rows.put_back(hidden)
        if cache is not None:
            cache.state, cache.columns = after, cache.columns + input_ids.shape[1]
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)


class _Rows(NamedTuple):
    """Where the tokens of a padded batch are."""

    lengths: Tensor  # (B,)
    first: Tensor  # (B, 1) the column of a row's first token

    @classmethod
    def of(cls, mask: Tensor, tokens: Tensor) -> _Rows | None:
        """Those of a mask of transformers; None if there is no padding."""
        batch, n = tokens.shape
        if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] < n:
            raise ValueError(f"FlashGau: `attention_mask` has shape {tuple(mask.shape)}; expected ({batch}, {n}) or "
                             "more columns, which were there before")  # fmt: skip
        valid = mask[:, mask.shape[1] - n :] != 0
        if bool(valid.all()):
            return None
        rows = cls(valid.sum(1), valid.int().argmax(1, keepdim=True))
        place = torch.arange(n, device=mask.device)
        if not bool((valid.gather(1, (place + rows.first) % n) == (place < rows.lengths[:, None])).all()):
            raise ValueError("FlashGau: `attention_mask` has 0 between tokens; expected padding on the left or right")
        return rows

    def begun(self, tokens: Tensor) -> Tensor:
        """The rows (B, N) with their tokens first, and 0 as padding."""
        place = torch.arange(tokens.shape[1], device=tokens.device)
        moved = tokens.gather(1, (place + self.first) % max(1, len(place)))
        return moved.masked_fill(place >= self.lengths[:, None], 0)

    def put_back(self, x: Tensor) -> Tensor:
        """The rows (B, N, d) with their tokens where they were."""
        n = x.shape[1]
        place = (torch.arange(n, device=x.device) - self.first) % n
        return x.gather(1, place[..., None].expand_as(x)) if bool(self.first.any()) else x


class _WithHead(_Base):
    """A stack and an output matrix, which may be the embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.stack.embedding.weight"}  # noqa: RUF012
    causal: bool

    def __init__(self, config: FlashGauConfig) -> None:
        if config.causal is not self.causal:
            config = copy.deepcopy(config)
            config.causal = self.causal
        super().__init__(config)
        self.model = FlashGauModel(config)
        self.lm_head = linear(config.dim, config.vocab_size, config.head_bias)
        self.post_init()

    def _loss(self, logits: Tensor, labels: Tensor | None, count: Any) -> Tensor | None:
        if labels is None:
            return None
        found: Tensor = self.loss_function(logits, labels, vocab_size=logits.shape[-1], num_items_in_batch=count)
        return found


class FlashGauForCausalLM(_WithHead, GenerationMixin):
    """`flashgau.models.CausalLM` for transformers.

    Args:
        config: the model.

    Example:
        >>> import torch
        >>> from flashgau.integrations.transformers import FlashGauConfig, FlashGauForCausalLM
        >>> model = FlashGauForCausalLM(FlashGauConfig(dim=32, depth=1, key_dim=16, chunk_size=16))
        >>> tuple(model.generate(torch.randint(256, (2, 9)), max_new_tokens=5, do_sample=False).shape)
        (2, 14)
    """

    causal = True

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: FlashGauCache | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Logits (B, N, vocab_size) of the token after each token.

        Args:
            input_ids: as of `FlashGauModel`.
            attention_mask: as there.
            past_key_values: as there.
            labels: (B, N), often the tokens themselves: label i + 1 is what logits i predict. -100 does not count.
            logits_to_keep: so many of the last, or those at these places; 0 for all.
            num_items_in_batch: what the loss's sum is divided by, from Trainer; None for the mean.
            kwargs: as there.
        """
        base = self.model(input_ids, attention_mask, past_key_values, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(base.last_hidden_state[:, kept])
        return CausalLMOutputWithPast(
            loss=self._loss(logits, labels, num_items_in_batch), logits=logits, past_key_values=base.past_key_values
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the model makes its own

    def prepare_inputs_for_generation(self, input_ids: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """The arguments of a call of the model within `generate`; refuses what is padded on the right."""
        mask = kwargs.get("attention_mask")
        if mask is not None and kwargs.get("is_first_iteration"):
            if mask.ndim == 2 and not bool(mask[:, -1].all()):
                raise ValueError(
                    "generate: `attention_mask` ends in 0; expected prompts that are padded on the left "
                    '(padding_side="left" of a tokenizer)'
                )
        elif kwargs.get("past_key_values") is not None:
            kwargs["attention_mask"] = None  # new tokens are no padding
        usual: Any = super()
        return usual.prepare_inputs_for_generation(input_ids, **kwargs)


class FlashGauForMaskedLM(_WithHead):
    """`flashgau.models.MaskedLM` for transformers.

    Args:
        config: the model.

    Example:
        >>> import torch
        >>> from flashgau.integrations.transformers import FlashGauConfig, FlashGauForMaskedLM
        >>> model = FlashGauForMaskedLM(FlashGauConfig(dim=32, depth=1, vocab_size=257))
        >>> tuple(model(torch.randint(257, (2, 9))).logits.shape)
        (2, 9, 257)
    """

    causal = False

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Logits (B, N, vocab_size) of every token in its place.

        Args:
            input_ids: as of `FlashGauModel`.
            attention_mask: as there.
            labels: (B, N) the original tokens; -100 does not count.
            num_items_in_batch: what the loss's sum is divided by, from Trainer; None for the mean.
            kwargs: as there.
        """
        logits = self.lm_head(self.model(input_ids, attention_mask, **kwargs).last_hidden_state)
        return MaskedLMOutput(loss=self._loss(logits, labels, num_items_in_batch), logits=logits)


def to_transformers(model: CausalLM | MaskedLM | Encoder) -> PreTrainedModel:
    """A model of `flashgau.models` as one of transformers, with the same parameters, not copies.

    Example:
        >>> from flashgau.integrations.transformers import to_transformers
        >>> from flashgau.models import CausalLM
        >>> type(to_transformers(CausalLM("flash-tiny"))).__name__
        'FlashGauForCausalLM'
    """
    classes = {CausalLM: FlashGauForCausalLM, MaskedLM: FlashGauForMaskedLM, Encoder: FlashGauModel}
    if type(model) not in classes:
        raise TypeError(f"to_transformers: `model` is a {type(model).__name__}; expected a model of flashgau.models")
    own = model.config.to_dict()
    del own["checkpointing"]
    made = classes[type(model)](FlashGauConfig(causal=type(model) is CausalLM, **own))
    parts = dict(model.named_parameters())
    if isinstance(made, _WithHead):
        names = {"head_weight": "lm_head.weight", "head_bias": "lm_head.bias"}
        parts = {names.get(name, f"model.{name}"): p for name, p in parts.items()}
        if model.config.tied:
            parts["lm_head.weight"] = parts["model.stack.embedding.weight"]
    made.load_state_dict(parts, assign=True)
    made.tie_weights()
    return made.train(model.training)


AutoConfig.register("flashgau", FlashGauConfig)
AutoModel.register(FlashGauConfig, FlashGauModel)
AutoModelForCausalLM.register(FlashGauConfig, FlashGauForCausalLM)
AutoModelForMaskedLM.register(FlashGauConfig, FlashGauForMaskedLM)
