"""`flashgau demo`: the whole package at work in five minutes, with a report to keep."""

from __future__ import annotations

import datetime
import itertools
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashgau.cli import check, doctor
from flashgau.cli.console import (
    FAILURE,
    INTERRUPTED,
    USAGE,
    dump_json,
    fail,
    failing,
    make_console,
    mebibytes,
    printable,
    seconds,
)
from flashgau.extras import extra

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from flashgau.cli.training.measuring import Point

FACTS, REPORT, TRAINING = "demo.json", "report.html", "training"
PROMPT = "def "
TEMPERATURE = 0.8


class Interrupted(Exception):
    """Ctrl-C, after a stage has put its own things in order."""


def fresh_folder(out: Path) -> Path | None:
    """Make `out` an empty folder. An older demo there is renamed to OUT.1, OUT.2, ...; that name is returned.

    Raises:
        FileExistsError: `out` holds something that no demo wrote; it is left alone.
        OSError: the folder cannot be made.
    """
    moved = None
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is not a folder")
    if out.is_dir() and any(out.iterdir()):
        if not (out / FACTS).is_file():
            raise FileExistsError(f"{out} is not an older demo (it has no {FACTS}); choose another folder")
        names = (out.with_name(f"{out.name}.{number}") for number in itertools.count(1))
        moved = next(name for name in names if not os.path.lexists(name))
        out.rename(moved)
    out.mkdir(parents=True, exist_ok=True)
    return moved


class Demo:
    """One demo: its folder, what it has found so far, and where it speaks."""

    out: Path
    console: Console
    minutes: float
    quick: bool
    began: float

    def __init__(self, out: Path, console: Console, *, minutes: float, quick: bool) -> None:
        import flashgau

        self.out, self.console, self.minutes, self.quick = out, console, minutes, quick
        self.began = time.perf_counter()
        self.model: Any = None
        self.facts: dict[str, Any] = {
            "version": flashgau.__version__,
            "started": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            "quick": quick,
            "device": "cpu",
            "finished": False,
        }

    def save(self) -> None:
        """Write what is known so far, as JSON and as a page; each file is replaced whole or not at all."""
        from flashgau.cli.training.report import render
        from flashgau.files import atomic_write

        self.facts["seconds"] = time.perf_counter() - self.began
        for name, text in ((FACTS, dump_json(self.facts)), (REPORT, render(self.facts))):
            with atomic_write(self.out / name) as stream:
                stream.write(text.encode())

    def say(self, line: str) -> None:
        """One line of a stage."""
        self.console.print(f"  {line}", soft_wrap=True)

    def run(self) -> None:
        """All stages in order, saved after each.

        Raises:
            Interrupted: Ctrl-C; everything up to there is saved.
        """
        stages: tuple[tuple[str, Callable[[], None]], ...] = (
            ("this machine", self.look_at_machine),
            ("agreement with the fp64 reference", self.check),
            (f"training a FLASH model for {seconds(60 * self.minutes)}", self.train),
            ("a sample, decoded with constant state", self.sample),
            ("time and memory against length", self.measure),
        )
        self.save()
        for number, (title, stage) in enumerate(stages, 1):
            self.console.print(f"\n[{number}/{len(stages)}] {title}", style="bold")
            try:
                stage()
                self.facts["finished"] = number == len(stages)
                self.save()
            except KeyboardInterrupt:
                self.save()
                raise Interrupted from None

    # stages

    def look_at_machine(self) -> None:
        """`flashgau doctor`."""
        self.facts["doctor"] = doctor.collect()
        for name, value in doctor.facts_rows(self.facts["doctor"]):
            self.say(f"{name}: {value}")

    def check(self) -> None:
        """`flashgau check`, or an even quarter of its cases when there is no time."""
        import torch

        from flashgau.verification import checking

        device = torch.device("cpu")
        pairs = checking.select(None, None, device, thorough=False)
        extent = "Every operation and option"
        if self.quick:
            pairs, extent = pairs[::4], "Every fourth case of the check of every operation and option"
        began = time.perf_counter()
        rows = check.run_with_progress(pairs, device)
        missed = [row for row in rows if not row.ok]
        self.facts["check"] = {
            "extent": extent,
            "cases": len(rows),
            "missed": len(missed),
            "seconds": time.perf_counter() - began,
            "summary": checking.summary(rows),
            # Without the tensors of each case, which would make the file ten times as long.
            "rows": [{key: value for key, value in asdict(row).items() if key != "tensors"} for row in rows],
        }
        check.show(rows, self.console, everything=False)

    def train(self) -> None:
        """Train on the standard library's source for some minutes."""
        from flashgau.cli.training.train import ProgressDisplay
        from flashgau.training import TrainConfig, train

        config = TrainConfig(
            model="flash",
            size="tiny",
            out=str(self.out / TRAINING),
            steps=None,
            max_minutes=self.minutes,
            # In so little time many small steps learn more than few large ones.
            batch=4,
            lr=2e-3,
            warmup=10 if self.quick else 50,
            eval_windows=16 if self.quick else 64,
            eval_every=20 if self.quick else 100,
            log_every=2 if self.quick else 10,
            save_every=1000,
            device="cpu",
        )
        with ProgressDisplay(make_console(stderr=True)) as display:
            result = train(config, callbacks=[display])
        self.model = result.model
        self.facts["training"] = {
            "config": config.to_dict(),
            "parameters": result.parameters,
            "step": result.step,
            "elapsed_seconds": result.elapsed_seconds,
            "bits_per_byte": result.bits_per_byte,
            "tokens_per_second": result.tokens_per_second,
            "data_source": result.data["source"],
            "interrupted": result.signal is not None,
            "log": [dict(row) for row in result.history],
        }
        bits = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.2f} bits per byte on unseen files"
        self.console.print(f"  {result.step} steps in {seconds(result.elapsed_seconds)}{bits}", soft_wrap=True)
        if result.signal is not None:
            raise KeyboardInterrupt  # the trainer caught it, and saved

    def sample(self) -> None:
        """Let the model continue a prompt, one byte at a time."""
        import torch

        count = 200 if self.quick else 600
        prompt = torch.tensor([list(PROMPT.encode())])
        began = time.perf_counter()
        tokens = self.model.generate(prompt, count, temperature=TEMPERATURE)
        elapsed = time.perf_counter() - began
        text = bytes(tokens[0].tolist()).decode(errors="replace")
        self.facts["sample"] = {
            "prompt": PROMPT,
            "text": printable(text),
            "new_bytes": count,
            "temperature": TEMPERATURE,
            "bytes_per_second": count / elapsed,
            "state_bytes": [
                state_bytes(self.model, context) for context in (prompt, torch.cat([prompt, tokens], dim=1))
            ],
        }
        for line in (PROMPT + printable(text)).splitlines():
            self.say(f"| {line}")

    def measure(self) -> None:
        """Time and memory of the three ways to mix tokens."""
        from flashgau.cli.training.measuring import Sizes, measure

        available = doctor.available_memory()
        longest = 2048 if self.quick else 8192
        sizes, ended = Sizes(), set[str]()

        def tell(point: Point) -> None:
            self.facts["measurements"].append(point.to_dict())
            if point.median is None or point.peak_bytes is None:
                text = f"ends here: more {point.skipped}"
            else:
                text = f"{seconds(point.median):>9}  {mebibytes(point.peak_bytes):>10}"
            if point.median is not None or point.provider not in ended:
                self.say(f"{point.length:>6} tokens  {point.provider:<18}  {text}")
            if point.median is None:
                ended.add(point.provider)

        self.facts["sizes"], self.facts["measurements"] = asdict(sizes), []
        measure(
            [256 << i for i in range(int(math.log2(longest // 256)) + 1)],
            budget=8.0 if self.quick else 75.0,
            sizes=sizes,
            # Half of what is free: the estimate is rough, and other programs are running.
            memory_limit=None if available is None else available // 2,
            on_point=tell,
        )


def state_bytes(model: Any, tokens: Tensor) -> int:
    """Bytes of what `model` remembers of `tokens` (1, N) to go on decoding."""
    import torch

    with torch.no_grad():
        return tensor_bytes(model(tokens, return_state=True)[1])


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dataclasses, tuples, lists and dictionaries."""
    from torch import Tensor

    if isinstance(value, Tensor):
        return value.nbytes
    if is_dataclass(value):
        return sum(tensor_bytes(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, dict):
        return sum(map(tensor_bytes, value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, (list, tuple)) else 0


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report; an older one is renamed.")] = Path("runs/demo"),
    minutes: Annotated[float, typer.Option(help="How long to train.", metavar="MINUTES")] = 2.5,
    quick: Annotated[bool, typer.Option("--quick", help="Everything, in less than a minute.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """See it all in five minutes: checks, training, a sample, time and memory against length, and a report.

    The page OUT/report.html holds everything, plots included; OUT/demo.json has its numbers and OUT/training the
    trained model. Ctrl-C ends the demo with a report of what was done.

    \b
    Examples:
      flashgau demo
      flashgau demo --minutes 10 --out runs/longer
      flashgau demo --quick
    """
    if not 0 < minutes < math.inf:
        fail("demo", f"--minutes is {minutes}; expected a positive number", USAGE)
    # All that it needs, before minutes of work rather than after them.
    with extra("plots"):
        import matplotlib  # noqa: F401
    with extra("models"):
        import safetensors  # noqa: F401
    console = make_console(stderr=as_json)
    with failing("demo"):
        moved = fresh_folder(out)
        if moved is not None:
            console.print(f"the older {out} is now {moved}", soft_wrap=True)
        show = Demo(out, console, minutes=min(minutes, 0.2) if quick else minutes, quick=quick)
        try:
            show.run()
        except Interrupted:
            console.print(f"\nstopped; what was done is in {out / REPORT}", soft_wrap=True)
            raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print(dump_json(show.facts))
    console.print(f"\n{seconds(show.facts['seconds'])}; the report is {out / REPORT}", soft_wrap=True)
    if show.facts["check"]["missed"]:
        raise typer.Exit(FAILURE)
