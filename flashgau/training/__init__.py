"""Training of byte-level language models: data, schedule, checkpoints and the loop.

from flashgau.training import TrainConfig, train
result = train(TrainConfig(model="flash", steps=None, max_minutes=2, out="runs/try"))
result.bits_per_byte, result.model
"""

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
