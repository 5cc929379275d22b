"""Training: texts, their parts, the windows drawn from them, and masks."""

from __future__ import annotations

import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from training_runs import write_tree

from flashgau.training import load_corpus, load_text
from flashgau.training.data import list_files, sample_starts, split_files, split_position, validation_starts, windows
from flashgau.training.objective import MASK, examples, mask_seeds

names = st.text("abcxyz_", min_size=1, max_size=6)
paths = st.lists(names, min_size=1, max_size=3).map("/".join)
# Contents without zero bytes, so that the separators divide a part into its files again.
contents = st.binary(min_size=1, max_size=40).map(lambda b: b.replace(b"\0", b"\1"))


def files_of(part: np.ndarray) -> list[bytes]:
    joined = part.tobytes()
    assert joined[:1] == joined[-1:] == b"\0"
    return joined[1:-1].split(b"\0")


@given(
    tree=st.dictionaries(paths, contents, min_size=2, max_size=12),
    fraction=st.floats(0.01, 0.99),
    order=st.randoms(use_true_random=False),
)
def test_folder_is_split_by_file(
    tree: dict[str, bytes], fraction: float, order: random.Random, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tree = {k: v for k, v in tree.items() if not any(other.startswith(k + "/") for other in tree)}
    first, second = tmp_path_factory.mktemp("a"), tmp_path_factory.mktemp("b")
    write_tree(first, tree)
    shuffled = list(tree.items())
    order.shuffle(shuffled)
    write_tree(second, dict(shuffled))
    assume(len(set(tree.values())) >= 2)
    corpus = load_corpus(first, validation_fraction=fraction)
    train_files, validation_files = files_of(corpus.train), files_of(corpus.validation)
    # Every distinct text once, none in both parts, both parts inhabited.
    assert sorted(train_files + validation_files) == sorted(set(tree.values()))
    assert train_files
    assert validation_files
    assert (len(train_files), len(validation_files)) == (corpus.train_files, corpus.validation_files)
    # The order of creation and the place do not matter; contents and split do.
    again = load_corpus(second, validation_fraction=fraction)
    assert again.fingerprint == corpus.fingerprint
    assert again.train.tobytes() == corpus.train.tobytes()
    name = sorted(tree)[0]
    (second / name).write_bytes(tree[name] + b"+")
    assert load_corpus(second, validation_fraction=fraction).fingerprint != corpus.fingerprint


@given(st.sets(paths, min_size=2, max_size=40), st.sets(paths, max_size=20), st.floats(0.05, 0.95))
def test_split_is_a_stable_partition(some: set[str], more: set[str], fraction: float) -> None:
    train_files, validation_files = split_files(sorted(some), fraction)
    assert train_files
    assert validation_files
    assert sorted(train_files + validation_files) == sorted(some)
    hashed_apart = len({split_position(path) < fraction for path in some}) == 2
    if hashed_apart:
        bigger = split_files(sorted(some | more), fraction)
        assert set(train_files) <= set(bigger[0])
        assert set(validation_files) <= set(bigger[1])


def test_split_fraction_is_the_share_of_files() -> None:
    positions = np.array([split_position(f"folder/file{number}.py") for number in range(20000)])
    for fraction in (0.05, 0.5, 0.9):
        deviation = (positions < fraction).mean() - fraction
        assert abs(deviation) < 5 * math.sqrt(fraction * (1 - fraction) / len(positions))


def test_which_files_of_a_folder_are_taken(tmp_path: Path) -> None:
    taken = {"b.txt": b"one", "a/z.py": b"two", "a.d/é.md": b"three", "late_zero": b"x" * 9000 + b"\0"}
    left = {
        ".hidden": b"h1",
        ".git/config": b"h2",
        "__pycache__/m.pyc": b"h3",
        "site-packages/p.py": b"h4",
        "empty": b"",
        "run/log.jsonl": b"own output",
    }
    write_tree(tmp_path, taken | left | {"binary": b"PK\0\1", "copy_of_b": b"one"})
    (tmp_path / "link_to_folder").symlink_to(tmp_path / "a")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link_to_file").symlink_to(tmp_path / "b.txt")
    os.mkfifo(tmp_path / "pipe")
    listed = list_files(tmp_path, exclude=tmp_path / "run")
    assert listed == sorted([*taken, "binary", "copy_of_b", "link_to_file"], key=os.fsencode)
    corpus = load_corpus(tmp_path, exclude=tmp_path / "run")
    assert corpus.train_files + corpus.validation_files == len(taken)


@given(content=st.binary(min_size=2, max_size=300), fraction=st.floats(0.01, 0.99))
def test_single_file_is_split_by_position(
    content: bytes, fraction: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("one")
    (folder / "text").write_bytes(content)
    corpus = load_corpus(folder / "text", validation_fraction=fraction)
    assert corpus.train.tobytes() + corpus.validation.tobytes() == content
    assert abs(corpus.validation.size - fraction * len(content)) <= 1
    assert 0 < corpus.validation.size < len(content)
    assert f"{corpus.validation.size} of {len(content)}" in corpus.source
    if b"\0" not in content:
        assert load_corpus(folder, validation_fraction=fraction).fingerprint == corpus.fingerprint


def test_whole_text_is_all_files_once(tmp_path: Path) -> None:
    write_tree(tmp_path / "folder", {"b": b"two", "a/c": b"one", "copy": b"two", "binary": b"\0", ".hidden": b"x"})
    assert load_text(tmp_path / "folder").tobytes() == b"\0one\0two\0"
    (tmp_path / "file").write_bytes(b"as it \0 is")
    assert load_text(tmp_path / "file").tobytes() == b"as it \0 is"
    for bad, error in (("nowhere", FileNotFoundError), ("folder/.hidden", ValueError)):
        with pytest.raises(error, match=r"data: .*expected"):
            load_text(tmp_path / bad)


def test_default_text_is_the_standard_library() -> None:
    corpus = load_corpus()
    total = corpus.train.size + corpus.validation.size
    assert total > 5e6
    assert corpus.train_files > 10 * corpus.validation_files > 0
    both = corpus.train.tobytes() + corpus.validation.tobytes()
    assert b"\0" + Path(os.__file__).read_bytes() + b"\0" in both
    assert b"\0" + Path(torch.__file__).read_bytes() + b"\0" not in both


@pytest.mark.parametrize(
    "case", ["missing", "empty folder", "only binary", "empty file", "one byte", "pipe", "fraction"]
)
def test_data_that_cannot_be_used(case: str, tmp_path: Path) -> None:
    target, fraction, kind = tmp_path / "it", 0.05, ValueError
    if case == "missing":
        kind = FileNotFoundError
    elif case == "empty folder":
        target.mkdir()
    elif case == "only binary":
        write_tree(target, {"a": b"\0a", "b": b"b\0"})
    elif case == "pipe":
        os.mkfifo(target)
    else:
        target.write_bytes(b"x" if case == "one byte" else b"" if case == "empty file" else b"text")
        fraction = 1.0 if case == "fraction" else fraction
    with pytest.raises(kind, match=r"^data: ") as caught:
        load_corpus(target, validation_fraction=fraction)
    assert case == "fraction" or str(target) in str(caught.value)


@given(
    size=st.integers(2, 10**12),
    length=st.integers(1, 10**6),
    count=st.integers(1, 40),
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 2**40),
)
def test_sampling_is_a_pure_function_of_seed_and_step(size: int, length: int, count: int, seed: int, step: int) -> None:
    length = min(length, size - 1)
    starts = sample_starts(size, count, length, seed, step)
    np.random.seed(0)  # the global generator has no part in it
    assert np.array_equal(starts, sample_starts(size, count, length, seed, step))
    assert starts.min() >= 0
    assert starts.max() + length + 1 <= size
    # A process that needs only the first rows of a step finds the same ones.
    assert np.array_equal(sample_starts(size, (count + 1) // 2, length, seed, step), starts[: (count + 1) // 2])
    if size - length > 10**9 and count > 3:
        assert not np.array_equal(starts, sample_starts(size, count, length, seed, step + 1))
        assert not np.array_equal(starts, sample_starts(size, count, length, seed ^ 1, step))


def test_sampling_is_uniform_and_pinned() -> None:
    starts = np.concatenate([sample_starts(116, 100, 16, 1, step) for step in range(2000)])
    counts = np.bincount(starts, minlength=100)
    assert counts.size == 100
    chi_square = ((counts - 2000.0) ** 2 / 2000.0).sum()
    assert abs(chi_square - 99) < 6 * math.sqrt(2 * 99)
    # Written down once: another value means that old runs can no longer be continued exactly.
    assert sample_starts(10**6, 4, 512, seed=42, step=7).tolist() == PINNED_STARTS


PINNED_STARTS = [450035, 305826, 554236, 35131]


@given(size=st.integers(2, 5000), length=st.integers(1, 200), count=st.integers(1, 50))
@example(size=17, length=16, count=5)
def test_validation_windows_do_not_overlap(size: int, length: int, count: int) -> None:
    length = min(length, size - 1)
    starts = validation_starts(size, count, length)
    assert len(starts) == min(count, (size - 1) // length)
    assert starts[0] == 0
    assert all(np.diff(starts) >= length)
    assert starts[-1] + length + 1 <= size


def test_target_of_a_byte_is_the_next_byte() -> None:
    data = np.frombuffer(b"to be or not to be", dtype=np.uint8)
    inputs, targets = windows(data, np.array([0, 3]), 5)
    assert inputs.dtype == targets.dtype == torch.int64
    assert [bytes(row.tolist()) for row in inputs] == [b"to be", b"be or"]
    assert [bytes(row.tolist()) for row in targets] == [b"o be ", b"e or "]


@given(
    size=st.integers(60, 400),
    length=st.integers(1, 50),
    count=st.integers(1, 12),
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 2**40),
)
def test_masks_are_a_pure_function_of_seed_step_and_window(
    size: int, length: int, count: int, seed: int, step: int
) -> None:
    text = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    starts = sample_starts(size, count, length, seed, step)
    seeds = mask_seeds(seed, step, count)
    torch.manual_seed(0)  # the global generator has no part in it
    inputs, targets = examples("mlm", text, starts, length, seeds)
    # A process that needs only some of the windows makes the same masks, whatever the others are.
    for row in range(count):
        alone = slice(row, row + 1)
        x, y = examples("mlm", text, starts[alone], length, mask_seeds(seed, step, count)[alone])
        assert torch.equal(x[0], inputs[row])
        assert torch.equal(y[0], targets[row])
    original = torch.from_numpy(np.stack([text[start : start + length] for start in starts]).astype(np.int64))
    chosen = targets != -100
    assert torch.equal(targets[chosen], original[chosen])
    assert torch.equal(inputs[~chosen], original[~chosen])
    assert not np.intersect1d(seeds, mask_seeds(seed, step + 1, count)).size
    assert not np.intersect1d(seeds, mask_seeds(seed ^ 1, step, count)).size


def test_masks_hide_the_right_shares() -> None:
    text = np.full(10_000, 7, dtype=np.uint8)
    starts = np.arange(100) * 99
    inputs, targets = examples("mlm", text, starts, 99, mask_seeds(3, 5, 100))
    count = int((targets == 7).sum())
    assert abs(count - 0.15 * 9900) < 5 * math.sqrt(0.15 * 0.85 * 9900)
    hidden, kept = (int(((inputs == token) & (targets == 7)).sum()) for token in (MASK, 7))
    assert abs(hidden - 0.8 * count) < 5 * math.sqrt(0.16 * count)
    assert abs(kept - 0.1 * count) < 5 * math.sqrt(0.09 * count)
