"""`flashgau eval`: how well a trained model predicts a text."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from flashgau.cli.console import dump_json, fail, failing, make_console, seconds
from flashgau.cli.training.sample import open_checkpoint


def evaluate(
    checkpoint: Annotated[
        Path, typer.Argument(help="File, or the folder of a run for its best weights.", metavar="CHECKPOINT")
    ],
    data: Annotated[Path, typer.Option(help="Text: any file, or a folder with all its files.", show_default=False)],
    context: Annotated[
        int | None, typer.Option(help="Bytes of a window. [default: as in training]", metavar="N", min=1)
    ] = None,
    batch: Annotated[int, typer.Option(help="Windows per forward pass.", metavar="N", min=1)] = 8,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Bits per byte of a whole text under a trained model.

    The text is cut into windows of --context bytes, each predicted on its own. A causal model predicts every byte but
    the first, from those before it in its window; a masked one predicts 15% of the bytes, always the same, from the
    others. The precision is that of the training.

    \b
    Examples:
      flashgau eval runs/first --data book.txt
      flashgau eval runs/first/last.safetensors --data notes/ --context 2048
      flashgau eval runs/masked --data book.txt --json
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    from flashgau import training
    from flashgau.models import MaskedLM

    model, config, _ = open_checkpoint("eval", checkpoint, device)
    if context is None and config is None:
        fail("eval", f"{checkpoint} does not say how long the windows of its training were; expected --context")
    objective = "mlm" if isinstance(model, MaskedLM) else "clm"
    console = make_console(stderr=True)
    columns = (BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    began = time.perf_counter()
    with failing("eval", "out of memory; try a smaller --batch"):
        text = training.load_text(data)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("eval", total=text.size)
            found = training.evaluate(
                model,
                text,
                context=context or config.length,  # type: ignore[union-attr]
                objective=objective,
                batch=batch,
                bf16=config is not None and config.bf16,
                told=lambda done: progress.update(task, completed=done),
            )
    elapsed = time.perf_counter() - began
    if as_json:
        facts = {"checkpoint": str(checkpoint), "data": str(data), "objective": objective, **asdict(found)}
        print(dump_json({**facts, "seconds": elapsed, "bytes_per_second": found.bytes / elapsed}))
        return
    kind = "masked bytes" if objective == "mlm" else "bytes"
    print(
        f"{found.bits_per_byte:.4f} bits per byte ({found.loss:.4f} nats) of {found.targets:,} {kind} of "
        f"{found.bytes:,}, in windows of {found.context:,}; {seconds(elapsed)}"
    )
