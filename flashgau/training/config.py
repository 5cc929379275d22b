"""What a training run is told, all in one object."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_type_hints

# What may differ between a checkpoint and the run that resumes it: how long, how often, where, and how the memory is
# used. All other fields decide which numbers are computed, and must be equal.
FREE = frozenset(
    {
        *("out", "data", "device", "steps", "max_minutes", "eval_every", "save_every", "log_every"),
        *("checkpointing", "shard", "context_parallel"),
    }
)

OBJECTIVES = ("clm", "mlm")

MOST_BYTES = 2**32
"""Of the windows of one step, which are all in memory at once, 17 bytes for each: far more than anybody trains on."""

# Written here because asking flashgau.models would load PyTorch for a page of help; a test compares them.
_KINDS = "flash, flash-quad, transformer, transformer++, mc-tfm++"
_SIZES = "tiny, small, medium, base"


def _option(default: Any, help: str, *, shown: str = "{}", metavar: str | None = None) -> Any:
    """A field for which `flashgau train` has an option: the command makes it from what is said here.

    Args:
        default: of the field.
        help: of the option.
        shown: how the help shows the default, {}; of a default None nothing is shown unless this says what it means.
        metavar: how the help shows the value; its type unless given.
    """
    if default is None and shown == "{}":
        shown = ""
    return field(default=default, metadata={"help": help, "shown": shown.format(default), "metavar": metavar})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a training run.

    Two runs with the same fields on the same text, machine and number of threads and processes are equal bit for bit.

    Attributes:
        model: kind of model, a name of `flashgau.models`.
        size: its named size.
        objective: "clm": predict the next byte. "mlm": fill in bytes that were masked out, seeing all others.
        data: file or folder of text; None is Python's standard library.
        out: folder of the run: checkpoints `last.safetensors` and `best.safetensors`, `log.jsonl`,
            `loss.png`, `config.json`.
        steps: optimizer steps of the whole run; None to be limited by `max_minutes` alone.
        max_minutes: minutes of the whole run, evaluations and earlier parts of a resumed run included. With
            `steps` too, the run ends at whichever comes first. Without `steps`, the learning rate follows the
            clock: such a run can be resumed, but not repeated bit for bit.
        batch: windows per forward pass, over all processes; each (with `context_parallel` each group that shares
            windows) takes an equal part of them.
        accumulate: forward passes per optimizer step; the loss is the mean over all of them.
        length: predicted bytes of a window.
        lr: highest learning rate.
        lr_final: learning rate at the end, as a fraction of `lr`.
        warmup: steps of linear warm-up; None is 100, or a tenth of `steps` if that is less.
        weight_decay: of weight matrices, decoupled from the gradient (AdamW).
        beta1: decay of AdamW's mean of gradients.
        beta2: decay of AdamW's mean of squared gradients.
        grad_clip: largest Euclidean norm of the gradient; a larger one is scaled down to it. None: no
            clipping.
        checkpointing: keep the input of each layer alone for the backward pass, and compute the rest again there.
        shard: with several processes, each holds a part of every parameter rather than all of them.
        context_parallel: how many processes share each window, a slice of its bytes each; if there are more, they are
            groups of so many, with windows of their own.
        bf16: compute under bfloat16 autocast; parameters and optimizer stay fp32.
        seed: of the initial weights, the batches, the masks and dropout.
        validation_fraction: share of the text kept for validation.
        eval_windows: most windows of one validation, of `length` bytes each; always the same ones.
        eval_every: steps between validations; there is one before the first step and one after the last.
        save_every: steps between checkpoints.
        log_every: steps between rows of the log.
        device: "auto" (a GPU if there is one), or a PyTorch device.
    """

    model: str = _option("flash", f"Kind of model: {_KINDS}.", metavar="KIND")
    size: str = _option("small", f"Its size: {_SIZES}.", metavar="NAME")
    objective: str = _option("clm", "clm: predict the next byte; mlm: fill in masked bytes.", metavar="clm|mlm")
    data: str | None = _option(
        None,
        "Text: any file, or a folder, whose files are split into training and validation.",
        shown="Python's standard library",
    )
    out: str = _option("runs/train", "Folder for checkpoints, log and loss curve.")
    steps: int | None = _option(2000, "Optimizer steps.", shown="{}, or no limit with --max-minutes")
    max_minutes: float | None = _option(
        None,
        "Minutes after which the run ends, earlier parts of a resumed run included. "
        "Without --steps the learning rate follows the clock.",
    )
    batch: int = _option(8, "Windows per forward pass, over all processes.")
    accumulate: int = _option(1, "Forward passes per optimizer step.")
    length: int = _option(512, "Bytes per window.")
    lr: float = _option(1e-3, "Highest learning rate.")
    lr_final: float = _option(0.1, "Learning rate at the end, as a fraction of --lr.")
    warmup: int | None = _option(None, "Steps of linear warm-up.", shown="100, at most a tenth of --steps")
    weight_decay: float = _option(0.1, "Decoupled weight decay of matrices.")
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float | None = _option(1.0, "Largest norm of the gradient; 0 for no limit.")
    checkpointing: bool = _option(
        False, "Compute layers again in the backward pass rather than keep what they computed."
    )
    shard: bool = _option(False, "Divide the parameters among the processes of torchrun.")
    context_parallel: int = _option(1, "Processes of torchrun that share each window, a slice of its bytes each.")
    bf16: bool = _option(False, "Compute in bfloat16; parameters stay fp32.")
    seed: int = _option(0, "Of weights, batches, masks and dropout.")
    validation_fraction: float = _option(0.05, "Share of the text that is not trained on.")
    eval_windows: int = _option(64, "Most windows per validation.")
    eval_every: int = _option(200, "Steps between validations.")
    save_every: int = _option(200, "Steps between checkpoints.")
    log_every: int = _option(10, "Steps between rows of the log.")
    device: str = _option("auto", "cpu, cuda, cuda:1 ...")

    def __post_init__(self) -> None:
        if self.steps is None and self.max_minutes is None:
            raise ValueError("TrainConfig: `steps` and `max_minutes` are both None; expected at least one limit")
        hints = get_type_hints(type(self))
        for told in fields(self):
            value, hint = getattr(self, told.name), hints[told.name]
            if value is None and hint in (int | None, float | None, str | None):
                continue
            if type(value) is int and not -(2**63) <= value < 2**63:  # which no tensor or counter holds
                raise ValueError(f"TrainConfig: `{told.name}` is {_shown(value)}; expected a number within 64 bits")
            if hint in (float, float | None) and isinstance(value, int) and not isinstance(value, bool):
                object.__setattr__(self, told.name, value := float(value))
            kind = {int | None: int, float | None: float, str | None: str}.get(hint, hint)
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise TypeError(f"TrainConfig: `{told.name}` is {_shown(repr(value))}; expected {kind.__name__}")
            self._check_range(told.name, value)
        for name in ("batch", "accumulate", "length"):
            if getattr(self, name) > MOST_BYTES:
                raise ValueError(f"TrainConfig: `{name}` is {getattr(self, name)}; expected at most {MOST_BYTES}")
        if self.bytes_per_step > MOST_BYTES:
            raise ValueError(
                f"TrainConfig: `batch` is {self.batch}, `accumulate` {self.accumulate} and `length` {self.length}, "
                f"together {self.bytes_per_step} bytes in a step; expected at most {MOST_BYTES}"
            )

    @staticmethod
    def _check_range(name: str, value: Any) -> None:
        """Refuse a value that no run can mean."""
        if name in _POSITIVE and not (0 < value < math.inf):
            raise ValueError(f"TrainConfig: `{name}` is {value}; expected a positive number")
        if name in ("warmup", "weight_decay") and not (0 <= value < math.inf):
            raise ValueError(f"TrainConfig: `{name}` is {value}; expected a number that is not negative")
        if name == "lr_final" and not 0 <= value <= 1:
            raise ValueError(f"TrainConfig: `{name}` is {value}; expected a number from 0 to 1")
        if name in ("beta1", "beta2") and not 0 <= value < 1:
            raise ValueError(f"TrainConfig: `{name}` is {value}; expected a number from 0 to below 1")
        if name == "validation_fraction" and not 0 < value < 1:
            raise ValueError(f"TrainConfig: `{name}` is {value}; expected a number between 0 and 1")
        if name == "seed" and not 0 <= value < 2**63:
            raise ValueError(f"TrainConfig: `{name}` is {value}; expected an integer from 0 to 2^63 - 1")
        if name == "objective" and value not in OBJECTIVES:
            raise ValueError(f"TrainConfig: `{name}` is {_shown(repr(value))}; expected one of {', '.join(OBJECTIVES)}")
        if name == "out" and not value:
            raise ValueError("TrainConfig: `out` is empty; expected the name of a folder")

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up, with the default worked out."""
        if self.warmup is not None:
            return self.warmup
        return 100 if self.steps is None else min(100, self.steps // 10)

    @property
    def bytes_per_step(self) -> int:
        """Predicted bytes of one optimizer step."""
        return self.batch * self.accumulate * self.length

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The configuration with these fields.

        Raises:
            ValueError: a field does not exist, or has an impossible value.
            TypeError: a field has a value of another type.

        Example:
            >>> TrainConfig.from_dict(TrainConfig(steps=5).to_dict()) == TrainConfig(steps=5)
            True
        """
        unknown = sorted(values.keys() - {told.name for told in fields(cls)})
        if unknown:
            raise ValueError(f"TrainConfig: no field named {_shown(', '.join(unknown))}")
        return cls(**values)


def _shown(value: Any) -> str:
    """A value out of a file, in few words."""
    text = str(value)
    return text if len(text) <= 100 else f"{text[:100]} ..."


_POSITIVE = frozenset(
    {
        *("steps", "max_minutes", "batch", "accumulate", "length", "lr", "grad_clip"),
        *("eval_windows", "eval_every", "save_every", "log_every", "context_parallel"),
    }
)
