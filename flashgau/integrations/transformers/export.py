"""Folders that `from_pretrained` loads, from models of `flashgau.models`, and a tokenizer of bytes for them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ...extras import extra
from ...models import CausalLM, Encoder, MaskedLM
from .models import to_transformers


def byte_tokenizer(masked: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of models of bytes: token i is byte i of a text in UTF-8, and a text comes back as it was.

    Batches are padded with byte 0: on the left, as `generate` needs it, or on the right with `masked`.

    Args:
        masked: with token 256, which a text has where it has "[MASK]".

    Example:
        >>> from flashgau.integrations.transformers import byte_tokenizer
        >>> tokenizer = byte_tokenizer()
        >>> tokenizer("né").input_ids, tokenizer.decode([110, 195, 169])
        ([110, 195, 169], 'né')
    """
    # A character for each byte, as GPT-2 has them: itself if it can be seen, else one past 255.
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in seen]
    vocab = {chr(byte if byte in seen else 256 + hidden.index(byte)): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Special tokens are not looked for in texts: a text may have the character that stands for byte 0.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=AddedToken(chr(256), special=True, normalized=False),
        split_special_tokens=True,
        padding_side="right" if masked else "left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **({"mask_token": "[MASK]"} if masked else {}),
    )


def export(model: CausalLM | MaskedLM | Encoder, folder: str | os.PathLike[str]) -> None:
    """Write a folder for `from_pretrained`, with `byte_tokenizer` if the model is one of bytes.

    Args:
        model: with 256 tokens, or as a `MaskedLM` 257, one of bytes.
        folder: its name, which nothing has yet.

    Raises:
        FileExistsError: something has.
        OSError: it cannot be written; then nothing is left of it.
    """
    with extra("models"):
        from safetensors import SafetensorError
    folder = Path(folder)
    if os.path.lexists(folder):
        raise FileExistsError(f"export: `folder` is {folder}, which exists; expected a new name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        to_transformers(model).save_pretrained(temporary)
        masked = isinstance(model, MaskedLM)
        if model.config.vocab_size == 256 + masked:
            byte_tokenizer(masked).save_pretrained(temporary)
        temporary.rename(folder)
    except SafetensorError as error:
        raise OSError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
