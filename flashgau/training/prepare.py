"""What a run begins with: its share of a batch, its device, its text; and why it cannot begin."""

from __future__ import annotations

import torch

from .config import TrainConfig
from .data import Corpus, load_corpus
from .processes import Processes


def check_batch(config: TrainConfig, processes: Processes) -> None:
    """Refuse a batch that cannot be divided equally among the processes, or the groups of those that share windows."""
    together = config.context_parallel
    if processes.count % together:
        raise ValueError(
            f"context_parallel: {processes.count} process{'es' if processes.count > 1 else ''} cannot be divided into "
            f"groups of {together}; expected a divisor of {processes.count}"
        )
    parts = processes.count // together
    if config.batch % parts:
        who = "processes" if together == 1 else f"groups of {together} processes"
        raise ValueError(
            f"batch: {config.batch} windows cannot be divided among {parts} {who}; expected a multiple of {parts}"
        )


def choose_device(config: TrainConfig, processes: Processes) -> torch.device:
    """The device that `config` names, if it can be used as asked; of several GPUs, this process's own."""
    several = processes.count > 1
    if config.device == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if config.device == "auto" or (config.device == "cuda" and several):
        number = torch.cuda.current_device()
        if several:
            number = torch.distributed.get_node_local_rank(number)
        if number >= torch.cuda.device_count():
            raise ValueError(
                f"device: process {processes.rank} is number {number} of its machine, which has "
                f"{torch.cuda.device_count()} GPUs; expected one process per GPU"
            )
        torch.cuda.set_device(number)
        return torch.device("cuda", number)
    if several and config.device.startswith("cuda"):
        raise ValueError(f"device: {config.device!r} is one GPU for {processes.count} processes; expected 'cuda'")
    try:
        device = torch.device(config.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device: {config.device!r} cannot be used: {reason}") from error
    if device.type == "meta":
        raise ValueError("device: 'meta' cannot be used: it holds no numbers")
    return device


def read_corpus(config: TrainConfig) -> Corpus:
    """The text, if its parts are long enough."""
    corpus = load_corpus(config.data, validation_fraction=config.validation_fraction, exclude=config.out)
    for part, text in (("training", corpus.train), ("validation", corpus.validation)):
        if text.size < config.length + 1:
            raise ValueError(
                f"data: the {part} text has {text.size} bytes; expected more than length = {config.length}"
            )
    return corpus


def check_masked(config: TrainConfig, count: int) -> None:
    """Refuse validation windows of which the masks hide nothing; of any size worth validating they hide 15%."""
    if not count:
        raise ValueError(
            f"eval_windows: none of the bytes of {config.eval_windows} windows of {config.length} is masked; "
            "expected more windows, or longer ones"
        )
