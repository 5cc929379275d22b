"""Training trials: a short run of `flashgau.training`, the pace of contestants, and steps timed side by side."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bench.cases import too_large
from bench.claims.variants import Spec, build, parameters
from bench.memory import cuda_peak_growth
from bench.timing import alternate, timer_for
from flashgau.training import CheckpointError, Event, TrainConfig, load_corpus, train
from flashgau.training.evaluation import loss_sum
from flashgau.training.folder import LAST
from flashgau.training.objective import count_targets, examples, mask_seeds
from flashgau.training.optimization import adamw

if TYPE_CHECKING:
    from bench.claims.run import Context

VALIDATIONS = 4  # of a trial, besides the one before its first step
CHECKPOINT_SECONDS = 30.0  # about what a kill loses


def train_config(spec: Spec, context: Context) -> TrainConfig:
    """What a trial tells `flashgau.training`: the schedule follows steps, so that it can be resumed to the bit."""
    settings, steps = context.settings, spec["steps"]
    return TrainConfig(
        objective=spec["objective"], data=settings.data, out=str(context.folder), steps=steps, batch=spec["batch"],
        length=spec["length"], lr=spec["lr"], seed=spec["seed"], bf16=settings.device == "cuda",
        device=settings.device, eval_windows=spec["windows"], eval_every=-(-steps // VALIDATIONS),
        save_every=spec["save_every"], log_every=steps,
    )  # fmt: skip


def run(spec: Spec, context: Context) -> dict[str, Any]:
    """Train as `spec` says, or go on from the checkpoint in the trial's folder; held-out loss in nats per byte.

    Of a run that diverges the loss is None.
    """
    config = train_config(spec, context)

    def told(event: Event) -> None:
        if event.kind == "step":
            context.tell(f"step {event.step} of {config.steps}")

    def attempt() -> Any:
        if not (context.folder / LAST).exists():
            shutil.rmtree(context.folder, ignore_errors=True)  # killed before there was anything to go on from
        model = build(spec, spec["seed"])
        return train(config, model=model, resume=context.folder.exists(), callbacks=[told])

    try:
        try:
            result = attempt()
        except CheckpointError:  # damaged, as a disk that was full leaves it
            shutil.rmtree(context.folder)
            result = attempt()
    except FloatingPointError as error:
        return {"loss": None, "reason": str(error).splitlines()[0], "curve": [], **told_of(spec)}
    if result.stopped == "signal":
        raise KeyboardInterrupt
    curve = [[row["step"], row["loss"]] for row in result.history if row["kind"] == "validation"]
    return {"loss": result.validation_loss, "reason": None, "curve": curve, **told_of(spec)}


def told_of(spec: Spec) -> dict[str, Any]:
    """What a reader of the record needs of a trial's specification."""
    tokens = spec["batch"] * spec["length"]
    return {"lr": spec["lr"], "steps": spec["steps"], "tokens": tokens * spec["steps"], "parameters": parameters(spec)}


def stepper(spec: Spec, device: str) -> Callable[[], object]:
    """One optimizer step on random bytes, as a trial makes it."""
    model = build(spec).to(device)
    optimizer = adamw(model, TrainConfig(), torch.device(device))
    text = np.random.Generator(np.random.Philox(key=1)).integers(256, size=2 * spec["length"], dtype=np.uint8)
    starts = np.arange(spec["batch"]) % spec["length"]
    inputs, targets = examples(spec["objective"], text, starts, spec["length"], mask_seeds(0, 0, spec["batch"]))
    place, share = torch.device(device), 1 / max(1, count_targets(targets))
    inputs, targets = inputs.to(place), targets.to(place)

    def step() -> None:
        loss = loss_sum(model, inputs, targets, place, device == "cuda") * share
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(model.parameters()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def pace(spec: Spec, context: Context) -> dict[str, Any]:
    """Seconds of a step of every model in `spec["models"]`, in rounds that take turns; and of reading the text.

    The quick sizes say one second for all, so that their trials do not depend on a clock.
    """
    began = time.perf_counter()
    load_corpus(context.settings.data)
    reading = time.perf_counter() - began
    if context.settings.quick:
        return {"seconds": dict.fromkeys(spec["models"], 1.0), "reading": reading}
    found = steps({**spec, "memory": False}, context)["seconds"]
    return {"seconds": {name: statistics.median(times) for name, times in found.items()}, "reading": reading}


def steps(spec: Spec, context: Context) -> dict[str, Any]:
    """Seconds of training steps of several models, side by side in random turns; and their peaks of memory, above
    what is there between steps.

    A model whose "matrices", the bytes of its N x N matrices, do not fit is left out, with the reason.
    """
    device, reasons = context.settings.device, {}
    for name, model in spec["models"].items():
        if (reason := too_large(model.get("matrices", 0.0), device)) is not None:
            reasons[name] = reason
    kept = {name: model for name, model in spec["models"].items() if name not in reasons}
    calls = {}
    for name, model in kept.items():
        context.tell(f"first step of {name}")
        calls[name] = stepper(model, device)
        calls[name]()
    context.tell(f"timing {', '.join(kept)}")
    times = alternate(
        calls, timer_for(device), warmup=1, min_rounds=spec["rounds"], max_rounds=spec.get("most", 50),
        seconds=spec["seconds"],
    )  # fmt: skip
    peaks: dict[str, int] = {}
    if spec["memory"]:
        context.tell("measuring memory")
        if device == "cuda":
            peaks = {name: cuda_peak_growth(call) for name, call in calls.items()}
        else:
            calls.clear()
            peaks = context.fresh({"what": "steps", "models": kept})
    return {"seconds": times, "peak_bytes": peaks, "reasons": reasons}
