"""`flashgau convert`: weights of other implementations, from file to file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashgau.cli.console import USAGE, dump_json, fail, failing

if TYPE_CHECKING:
    from torch import nn

FORMATS = ("flashgau", "flash-pytorch")
TENSORFLOW = re.compile(r"\.(index|meta|data-\d+-of-\d+|h5|hdf5|keras|pb|npz|npy)$")
SHOWN = 500  # characters of a reason, which may list every tensor of a file


def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A state dict: .safetensors, or of torch.save.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write, which must not be there yet.")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help=f"What to write: {', '.join(FORMATS)}.")] = FORMATS[0],
    causal: Annotated[
        bool | None, typer.Option("--causal/--no-causal", help="FLASH-pytorch: one is needed, no file says which.")
    ] = None,
    group_size: Annotated[int | None, typer.Option(metavar="N", min=1, help="Of FLASH; 256 unless given.")] = None,
    shift_tokens: Annotated[
        bool | None,
        typer.Option("--shift-tokens/--no-shift-tokens", help="Of FLASH; a FLASHTransformer does, unless given."),
    ] = None,
    laplace: Annotated[bool | None, typer.Option("--laplace", help="It was made with laplace_attn_fn=True.")] = None,
    residual: Annotated[
        bool | None, typer.Option("--no-residual", help="A GAU that was made with add_residual=False.")
    ] = None,
    padded_length: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="FLASH-pytorch: all rows were padded to this length.")
    ] = None,
    token_type: Annotated[int | None, typer.Option(metavar="N", min=0, help="GAU-alpha: the segment; 0.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Make a file of flashgau's from weights of FLASH-pytorch or GAU-alpha, or one of FLASH-pytorch's from flashgau's.

    Which of FLASH-pytorch's GAU, FLASH and FLASHTransformer it is, or GAU-alpha, and how large, is read from the names
    and shapes in the file. No code of the file is run, and nothing is overwritten.

    \b
    Examples:
      flashgau convert flash.pt flash.safetensors --causal --group-size 128
      flashgau convert pytorch_model.bin gau_alpha.safetensors
      flashgau convert flash.safetensors back.pt --to flash-pytorch
    """
    given = {
        "--causal": ("causal", causal),
        "--group-size": ("group_size", group_size),
        "--shift-tokens": ("shift_tokens", shift_tokens),
        "--laplace": ("laplace_attn_fn", laplace),
        "--no-residual": ("add_residual", None if residual is None else False),
        "--padded-length": ("padded_length", padded_length),
        "--token-type": ("token_type", token_type),
    }
    options = {option: pair for option, pair in given.items() if pair[1] is not None}
    if to not in FORMATS:
        fail("convert", f"--to is {to!r}; expected one of {', '.join(FORMATS)}", USAGE)
    if out.exists():
        fail("convert", f"{out} is there already, and is left as it is; expected another name", USAGE)
    _refuse_tensorflow(source)
    with failing("convert"):
        write = _to_flashgau if to == FORMATS[0] else _to_flash_pytorch
        found, assumed, made = write(source, out, options)
    parameter = next(made.parameters())
    sizes = _sizes(made) | {"dtype": str(parameter.dtype).removeprefix("torch.")}
    count = sum(p.numel() for p in made.parameters())
    if as_json:
        facts = {"source": str(source), "found": found, **sizes, "assumed": assumed, "parameters": count}
        print(dump_json({**facts, "out": str(out), "format": to, "class": type(made).__name__}))
        return
    print(f"{source}: {found}, {', '.join(f'{name} {value}' for name, value in sizes.items())}")
    if assumed:
        print(f"taken as, for no file says it: {', '.join(f'{name} {value}' for name, value in assumed.items())}")
    reader = "flashgau.models.load" if hasattr(made, "stack") else "flashgau.convert.load_layer"
    read = "" if to != FORMATS[0] else f"; {reader} reads it"
    print(f"wrote {out}: {type(made).__name__}, {count:,} parameters{read}")


def _refuse_tensorflow(source: Path) -> None:
    within = (source / "saved_model.pb", source.with_name(f"{source.name}.index"))
    if TENSORFLOW.search(source.name) or (not source.is_file() and any(path.exists() for path in within)):
        fail(
            "convert",
            f"{source} is TensorFlow's or NumPy's, by its name; expected a state dict of PyTorch: read it there "
            "(tf.train.load_checkpoint, numpy.load), and torch.save its tensors under the names of PyTorch's port",
        )


def _sizes(made: Any) -> dict[str, Any]:
    config = getattr(made, "config", made)
    names = ("dim", "hidden", "key_dim", "depth", "vocab_size")
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def _to_flashgau(source: Path, out: Path, options: dict[str, Any]) -> tuple[str, dict[str, Any], nn.Module]:
    """What was found, what was taken for granted, and what was written."""
    from flashgau.convert import files, flash_pytorch, from_flash_pytorch, from_gau_alpha
    from flashgau.convert.state import read_state

    state = read_state("convert", source)
    try:
        kind = files.kind_of(state)
        hints = flash_pytorch.HINTS.get(kind, {})
        known = {*hints, "padded_length"} if hints else {"token_type"}
        if foreign := [option for option, (name, _) in options.items() if name not in known]:
            fail("convert", f"{source} holds a {kind}, which has no {', '.join(foreign)}", USAGE)
        values = dict(options.values())
        if hints and "causal" not in values:
            fail("convert", f"{source} holds a {kind}, causal or not; expected --causal or --no-causal", USAGE)
        made: Any = from_flash_pytorch(state, **values) if hints else from_gau_alpha(state, **values)
    except (ValueError, TypeError) as error:
        reason = re.sub(r"^from_\w+: ", "", str(error))
        raise ValueError(f"{source}: {reason[:SHOWN]}{' ...' if len(reason) > SHOWN else ''}") from error
    if hasattr(made, "stack"):
        made.save(out)
    else:
        files.save_layer(made, out)
    assumed = {name: value for name, value in hints.items() if name not in values}
    return (f"FLASH-pytorch's {kind}" if hints else kind), assumed, made


def _to_flash_pytorch(source: Path, out: Path, options: dict[str, Any]) -> tuple[str, dict[str, Any], nn.Module]:
    import torch

    from flashgau.convert import files, to_flash_pytorch
    from flashgau.extras import extra
    from flashgau.files import atomic_write

    if options:
        fail(
            "convert", f"{', '.join(options)} says what a file of FLASH-pytorch's does not; a flashgau file does", USAGE
        )
    ours = files.load_convertible(source)
    try:
        state = to_flash_pytorch(ours).state_dict()
    except ModuleNotFoundError:
        fail("convert", "--to flash-pytorch asks FLASH-pytorch: pip install FLASH-pytorch==0.1.9")
    with atomic_write(out) as stream:
        if out.suffix == ".safetensors":
            with extra("models"):
                from safetensors.torch import save as to_bytes
            stream.write(to_bytes({name: tensor.clone() for name, tensor in state.items()}))  # some share memory
        else:
            torch.save(state, stream)
    return f"flashgau's {type(ours).__name__}", {}, ours
