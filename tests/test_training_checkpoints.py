"""Training: checkpoints and what damages them."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_runs
from checks import check_owned
from hypothesis import given
from hypothesis import strategies as st
from training_runs import FIXTURES

from flashgau.files import atomic_write
from flashgau.models import CausalLM, ModelConfig
from flashgau.training import CheckpointError, TrainConfig, load_config, load_model, resume_config, train, trainer
from flashgau.training.checkpoint import differences, read_checkpoint, read_metadata, write_checkpoint
from flashgau.training.folder import LAST
from flashgau.training.restore import State

config = training_runs.config
quick_plots = training_runs.quick_plots
text = training_runs.text

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


@st.composite
def tensor_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    result = {}
    for name in draw(st.sets(st.text(max_size=5), max_size=5)):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        dtype = draw(st.sampled_from(DTYPES))
        numbers = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
        result[name] = numbers.to(dtype).movedim(0, -1) if shape else numbers.to(dtype)
    return result


@given(
    tensors=tensor_dicts(),
    state=st.dictionaries(st.text(max_size=4), st.integers() | st.floats(allow_nan=False, allow_infinity=False)),
)
def test_checkpoint_round_trip(
    tensors: dict[str, torch.Tensor], state: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    tensors.pop("__metadata__", None)
    path = tmp_path_factory.mktemp("c") / "x.safetensors"
    write_checkpoint(path, tensors, {"state": state})
    loaded, metadata = read_checkpoint(path)
    assert metadata["state"] == state == read_metadata(path)["state"]
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert os.listdir(path.parent) == [path.name]


def test_what_a_checkpoint_gives_owns_its_memory(tmp_path: Path) -> None:
    """Odd sizes, after which the next tensor of a mapped file lies on a multiple of 8 bytes, or of less."""
    kinds = itertools.product((torch.float64, torch.float32, torch.bfloat16, torch.uint8), (1, 3, 7))
    tensors = {f"{i}": torch.arange(n, dtype=dtype) for i, (dtype, n) in enumerate(kinds)}
    write_checkpoint(tmp_path / "x.safetensors", tensors, {})
    found, _ = read_checkpoint(tmp_path / "x.safetensors")
    check_owned(found.values())
    some, _ = read_checkpoint(tmp_path / "x.safetensors", lambda name: name in "147")
    assert sorted(some) == ["1", "4", "7"]
    check_owned([*some.values(), *found.values()])


def test_a_resumed_run_owns_its_memory(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters and moments as an uninterrupted run has them: on boundaries of 64 bytes, each for itself."""
    config = replace(config, size="tiny", steps=2, batch=1, accumulate=1, eval_windows=1)
    train(config)
    load, counts = trainer._Run.load, []

    def watched(run: Any, path: Path) -> None:
        load(run, path)
        moments = [t for state in run.optimizer.state.values() for t in state.values()]
        check_owned([*(p.detach() for p in run.model.parameters()), *moments])
        counts.append((len(moments), len(list(run.model.parameters()))))

    monkeypatch.setattr(trainer._Run, "load", watched)
    result = train(replace(config, steps=3), resume=True)
    ((moments, parameters),) = counts
    assert moments == 3 * parameters
    loaded = load_model(result.checkpoint)
    check_owned([*loaded.parameters(), *loaded.buffers()])


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("small") / "x.safetensors"
    tensors = {"model.a": torch.arange(12.0).reshape(3, 4), "model.b": torch.arange(4, dtype=torch.uint8)}
    write_checkpoint(path, tensors, {"state": {"step": 7}})
    return path, path.read_bytes()


@given(data=st.data())
def test_no_damage_goes_unnoticed(small_checkpoint: tuple[Path, bytes], data: st.DataObject) -> None:
    path, whole = small_checkpoint
    good = read_checkpoint_bytes(path, whole)
    position = data.draw(st.integers(0, len(whole) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
    byte = data.draw(st.integers(1, 255))
    if kind == "flip":
        damaged = whole[:position] + bytes([whole[position] ^ byte]) + whole[position + 1 :]
    elif kind == "cut":
        damaged = whole[:position]
    else:
        damaged = whole[:position] + bytes([byte]) + whole[position:]
    try:
        seen = read_checkpoint_bytes(path, damaged)
    except CheckpointError as error:
        message = str(error)
        assert str(path) in message
        assert "\n" not in message
    else:
        assert seen == good  # harmless: white space of the header, say


def read_checkpoint_bytes(path: Path, content: bytes) -> object:
    path.write_bytes(content)
    tensors, metadata = read_checkpoint(path)
    return {k: (t.dtype, t.tolist()) for k, t in tensors.items()}, metadata


def test_files_that_are_not_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match="not a file"):
        read_checkpoint(tmp_path)
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="no training state"):
        read_checkpoint(tmp_path / "other.safetensors")
    torch.save({"a": torch.ones(2)}, tmp_path / "pickle.pt")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_checkpoint(tmp_path / "pickle.pt")


# What may stand in a file in the place of any value.
ODD = [
    None,
    True,
    -1,
    0,
    3,
    2**31,
    10**9,
    10**12,
    10**400,
    1e30,
    -0.5,
    "",
    "a",
    "\ud800",
    "\x1b[31m\n",
    [],
    [[[1]]],
    {},
    {"a": 1},
]


@st.composite
def mutations(draw: st.DrawFn, whole: dict[str, Any]) -> dict[str, Any]:
    """`whole` with one value somewhere in it replaced, left out, or added."""
    changed = json.loads(json.dumps(whole))
    place = changed
    while True:
        key = draw(st.sampled_from(sorted(place)))
        if not (isinstance(place[key], dict) and place[key] and draw(st.booleans())):
            break
        place = place[key]
    kind = draw(st.sampled_from(["replace", "replace", "leave out", "add"]))
    if kind == "leave out":
        del place[key]
    else:
        place[key if kind == "replace" else "new"] = draw(st.sampled_from(ODD))
    return changed


def tiny_checkpoint() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and metadata of a model that `load_model` can make."""
    described = ModelConfig(dim=8, depth=2, key_dim=4, chunk_size=4)
    data = {"source": "", "fingerprint": "", "train_bytes": 1, "train_files": 1}
    metadata = {"config": TrainConfig().to_dict(), "model": described.to_dict(), "data": data}
    state = {field.name: field.default for field in fields(State)}
    return {f"model.{k}": v for k, v in CausalLM(described).state_dict().items()}, {**metadata, "state": state}


def refusal(read: Callable[[Path], object], path: Path) -> str:
    """What a CheckpointError of `read` says, or the path if there is none."""
    try:
        read(path)
    except CheckpointError as error:
        return str(error)
    return str(path)


@given(data=st.data())
def test_a_checkpoint_of_any_form_is_a_model_or_refused(data: st.DataObject, tmp_path_factory: Any) -> None:
    """In its right checksum anything may be written: nothing is allocated from it, and the file is named."""
    tensors, whole = tiny_checkpoint()
    path = tmp_path_factory.mktemp("form") / LAST
    write_checkpoint(path, tensors, data.draw(mutations(whole)))
    for read in (load_model, load_config, lambda file: resume_config(file.parent)):
        message = refusal(read, path)
        assert str(path) in message
        assert len(message) < 900


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("model", {"dim": 10**9}, "its `model`: it describes no model of this version: Storage size"),
        ("model", {"dim": 10**6}, "does not fit its own configuration: .*1000000"),
        ("model", {"dim": 10**30}, "its `model`: it describes no model of this version"),
        ("model", {"depth": 100_000}, "`depth` is 100000, and there are 2 layers"),
        ("model", {"layer": {"option_of_2027": 1}}, "option_of_2027"),
        ("config", {"batch": 10**12}, "its `config`: TrainConfig: `batch` is 10{12}; expected at most"),
        ("config", {"steps": "many"}, "its `config`: TrainConfig: `steps` is 'many'; expected int"),
        ("config", {"momentum": 1}, "no field named momentum"),
    ],
)
def test_numbers_of_a_checkpoint_are_compared_before_they_are_used(
    part: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tensors, metadata = tiny_checkpoint()
    write_checkpoint(tmp_path / LAST, tensors, metadata)
    assert load_model(tmp_path / LAST).config.dim == 8
    write_checkpoint(tmp_path / LAST, tensors, {**metadata, part: {**metadata[part], **changes}})
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / LAST)


@pytest.mark.parametrize(
    "text", ["", "7", "[]", "{", "NaN", "[" * 100_000, '{"format": ' + "9" * 5000 + "}", '{"format": []}']
)
def test_a_header_that_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    save_file({"model.a": torch.ones(2)}, tmp_path / "x", {"flashgau": text, "digest": digest})
    for read in (read_metadata, read_checkpoint, load_model, load_config):
        with pytest.raises(CheckpointError, match=r"checkpoint .*/x (is damaged: its header: not JSON|has format)"):
            read(tmp_path / "x")


@FIXTURES
@given(limit=st.integers(0, 4000))
def test_failure_at_any_byte_keeps_the_old_checkpoint(tmp_path_factory: pytest.TempPathFactory, limit: int) -> None:
    """A real failure of the system's write: files may not grow past `limit` bytes."""
    path = tmp_path_factory.mktemp("f") / "x.safetensors"
    write_checkpoint(path, {"a": torch.zeros(3)}, {"state": 1})
    old = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="previous one is intact") as caught:
            write_checkpoint(path, {"a": torch.zeros(1000)}, {"state": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failure_of_any_call_keeps_the_old_file(
    call: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(b"old")

    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, call, broken)
    with pytest.raises(type(error)), atomic_write(tmp_path / "x") as stream:
        stream.write(b"new")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_kill_while_writing_never_leaves_half_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_checkpoint(path, {"a": torch.zeros(50_000)}, {"state": 0})
    for delay in np.linspace(0.001, 0.02, 12):
        child = os.fork()
        if child == 0:
            for version in range(1, 10**6):
                write_checkpoint(path, {"a": torch.full((50_000,), version)}, {"state": version})
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        tensors, metadata = read_checkpoint(path)
        assert (tensors["a"] == metadata["state"]).all()
    (tmp_path / ".mine.tmp").write_bytes(b"not ours")
    trainer.files.remove_temporaries(path)
    assert sorted(os.listdir(tmp_path)) == [".mine.tmp", path.name]


def test_differences_are_named_and_few() -> None:
    assert differences({"a": 1}, {"a": 1}) == ""
    assert differences({"a": 1, "b": 2}, {"b": 3, "c": 4}) == (
        "a is not in the checkpoint; b is 3 in the checkpoint, 2 here; c is only in the checkpoint"
    )
    assert differences(dict.fromkeys("abcdef", 1), {}).endswith("; and 2 more")
