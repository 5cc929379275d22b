"""`flashgau sample`: text that a trained model writes."""

from __future__ import annotations

import codecs
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashgau.cli.console import USAGE, advancing, dump_json, fail, failing, output_lost, printable, usable_device

if TYPE_CHECKING:
    import torch

    from flashgau.training import TrainConfig

ESCAPES = {r"\n": "\n", r"\t": "\t", r"\0": "\0"}


def open_checkpoint(command: str, path: Path, device: str) -> tuple[Any, TrainConfig | None, torch.device]:
    """The language model at `path`, the configuration of its training if the file has one, and its device.

    A file that cannot be loaded, or holds no model of bytes, ends the command with a message.

    Args:
        command: whose message that is.
        path: a checkpoint of `flashgau train`, the folder of a run (for its best weights), or what `save` of a model
            wrote.
        device: where to put the model; "auto" is a GPU if there is one.
    """
    import torch

    from flashgau import models, training

    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    where = usable_device(command, automatic if device == "auto" else device)
    config = None
    with failing(command):
        if path.is_dir():
            names = ("best.safetensors", "last.safetensors")
            path = next((path / name for name in names if (path / name).exists()), path)
        try:
            model: Any = training.load_model(path, where)
            config = training.load_config(path)
        except training.CheckpointError as error:
            try:
                model = models.load(path, where)
            except (OSError, ValueError):
                raise error from None  # the file is no model by itself either
    if not all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values()):
        fail(command, f"{path} holds weights that are infinite or no numbers")
    tokens = model.config.vocab_size
    if (type(model), tokens) not in ((models.CausalLM, 256), (models.MaskedLM, 257)):
        found = f"{type(model).__name__} with a vocabulary of {tokens}"
        fail(command, f"{path} holds a {found}; expected a CausalLM of 256 bytes, or a MaskedLM of these and a mask")
    return model, config, where


def stop_byte(text: str) -> int:
    r"""The byte that an argument of --stop means: one character, or an escape.

    Example:
        >>> stop_byte("."), stop_byte(r"\n")
        (46, 10)
    """
    content = os.fsencode(ESCAPES.get(text, text))
    if len(content) != 1:
        fail("sample", f"--stop is {text!r}; expected one character of one byte, or one of {', '.join(ESCAPES)}", USAGE)
    return content[0]


def sample(
    checkpoint: Annotated[
        Path, typer.Argument(help="File, or the folder of a run for its best weights.", metavar="CHECKPOINT")
    ],
    prompt: Annotated[str, typer.Option(help="Text to continue. [default: a line break]", show_default=False)] = "\n",
    max_new: Annotated[int, typer.Option("--max-new", help="Most bytes to add.", metavar="N", min=0)] = 500,
    temperature: Annotated[
        float, typer.Option(help="Below 1 more, above 1 less likely bytes; 0 for the most likely.", min=0.0)
    ] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Draw among the N most likely only.", metavar="N", min=1)] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw among the fewest bytes that have this probability.", min=0.0, max=1.0)
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Draw the same text again. [default: a new one]", metavar="N", min=0, max=2**64 - 1),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help=r"End after this character, \n for a line break; may be repeated.", metavar="CHARACTER"),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the text and how it was made as JSON.")] = False,
) -> None:
    """Let a trained causal model continue a text, byte by byte, as it is drawn.

    Control characters, and bytes that are no UTF-8, are shown as the replacement character.

    \b
    Examples:
      flashgau sample runs/first
      flashgau sample runs/first/last.safetensors --prompt "def " --temperature 0.8 --seed 1
      flashgau sample runs/first --prompt "import " --stop "\\n" --json
    """
    import secrets

    import torch

    from flashgau.models import MaskedLM

    if not prompt:
        fail("sample", "--prompt is empty; expected at least one character", USAGE)
    if not math.isfinite(temperature):
        fail("sample", f"--temperature is {temperature}; expected a finite number", USAGE)
    stops = [stop_byte(text) for text in stop or ()]
    model, _, where = open_checkpoint("sample", checkpoint, device)
    if isinstance(model, MaskedLM):
        fail("sample", f"{checkpoint} holds a masked model, which fills in bytes; expected a causal one")
    seed = secrets.randbits(32) if seed is None else seed
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    pieces: list[str] = []

    def show(text: str) -> None:
        head = printable(prompt) if not pieces and prompt != "\n" else ""
        pieces.append(printable(text))
        if not as_json:
            sys.stdout.write(head + pieces[-1])
            sys.stdout.flush()
            if output_lost():
                raise typer.Exit()  # nobody reads on

    began = time.perf_counter()
    with failing("sample"), advancing("reading the prompt") as advance:
        new = model.generate(
            torch.tensor([list(os.fsencode(prompt))], device=where),
            max_new,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stops or None,
            stream=lambda column: show(decoder.decode(bytes(column.tolist()))),
            progress=advance,
        )
    elapsed = time.perf_counter() - began
    show(decoder.decode(b"", final=True))
    count = new.shape[1]
    if not as_json:
        print()
        return
    facts = {
        "checkpoint": str(checkpoint),
        "prompt": prompt,
        "text": "".join(pieces),
        "new_bytes": count,
        "stopped": bool(count and new[0, -1].item() in stops),
        "seed": seed,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "bytes_per_second": count / elapsed if count else None,
    }
    print(dump_json(facts))
