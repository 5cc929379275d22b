"""`flashgau export`: a trained model as a folder of Hugging Face transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flashgau.cli.console import fail, failing
from flashgau.cli.training.sample import open_checkpoint


def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="File, or the folder of a run for its best weights.", metavar="CHECKPOINT")
    ],
    folder: Annotated[Path, typer.Argument(help="A new folder.", metavar="DIR")],
) -> None:
    """Write a trained model as a folder that `from_pretrained` of Hugging Face transformers loads, with a tokenizer.

    The tokenizer needs no code of flashgau; the model needs `import flashgau.integrations.transformers` before, or
    flashgau-transformers installed.

    \b
    Examples:
      flashgau export runs/first exported
      flashgau export runs/first/last.safetensors exported
    """
    model, _, _ = open_checkpoint("export", checkpoint, "cpu")
    try:
        from flashgau.integrations.transformers import export as write
    except ImportError as error:
        fail("export", f"{error}: pip install 'flashgau[transformers]'")
    with failing("export"):
        write(model, folder)
    print(f"{folder}: a {type(model).__name__} of {model.num_parameters():,} parameters, and its tokenizer of bytes")
