"""Training of byte-level language models: data, schedule, checkpoints and the loop.

from flashgau.training import TrainConfig, train
result = train(TrainConfig(model="flash", steps=None, max_minutes=2, out="runs/try"))
result.bits_per_byte, result.model
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import CheckpointError
    from .config import TrainConfig
    from .data import Corpus, load_corpus, load_text
    from .evaluation import Evaluation, evaluate
    from .optimization import learning_rate
    from .processes import Elsewhere, Processes, launched
    from .restore import load_config, load_model, resume_config
    from .results import Callback, Event, TrainResult
    from .trainer import train

__all__ = [
    "Callback",
    "CheckpointError",
    "Corpus",
    "Elsewhere",
    "Evaluation",
    "Event",
    "Processes",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "launched",
    "learning_rate",
    "load_config",
    "load_corpus",
    "load_model",
    "load_text",
    "resume_config",
    "train",
]

# Each loads when it is first used: the help of `flashgau train` asks for the configuration, and not for PyTorch.
_HOMES = {
    "checkpoint": ("CheckpointError",),
    "config": ("TrainConfig",),
    "data": ("Corpus", "load_corpus", "load_text"),
    "evaluation": ("Evaluation", "evaluate"),
    "optimization": ("learning_rate",),
    "processes": ("Elsewhere", "Processes", "launched"),
    "restore": ("load_config", "load_model", "resume_config"),
    "results": ("Callback", "Event", "TrainResult"),
    "trainer": ("train",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{home}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
