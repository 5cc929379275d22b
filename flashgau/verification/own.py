"""`flashgau.tuning.search`: the fastest configuration of a kernel of one's own, among those whose results are right."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashgau import tables
from flashgau.ops.compare import Standard, map_tensors
from flashgau.tables.config import Config
from flashgau.tables.table import FUSED, Fields, Key, TableEntry, config_of
from flashgau.tuning import ahead, searching
from flashgau.tuning.ahead import Compiled
from flashgau.verification import candidates
from flashgau.verification.candidates import Bench

UNTRIED = "not tried: another candidate left the device unusable for this process"


@dataclass(frozen=True)
class Tried:
    """What became of one candidate.

    Attributes:
        config: the candidate.
        ms: milliseconds of a call of the launcher; None of one that was not timed.
        max_error: of the result that comes nearest to what is allowed, or is farthest beyond; None if nothing ran.
        tolerance: what that error may be.
        needs: what its kernels need, if they were compiled ahead of the call.
        reason: why it is out, if it is.
    """

    config: Config
    ms: float | None = None
    max_error: float | None = None
    tolerance: float | None = None
    needs: list[Compiled] = field(default_factory=list)
    reason: str | None = None


@dataclass(frozen=True)
class Ranking:
    """What a search found: `print` shows a table, `.best` is the winner, and `bool` tells whether there is one.

    Attributes:
        key: where the entry stands in the table.
        device: what the tables call it.
        rows: the candidates that are right, the fastest first; then those that are out, in the order of the space.
        entry: the fastest with its time, and the time of what the table had, which stays unless 2 percent are gained;
            None if all candidates are out.
        path: the table it was written to; None if it was not.
    """

    key: Key
    device: str
    rows: list[Tried]
    entry: TableEntry | None = None
    path: Path | None = None

    @property
    def best(self) -> Config | None:
        """The configuration of the entry, None if there is none."""
        return self.entry.choice if self.entry is not None and isinstance(self.entry.choice, Config) else None

    def __bool__(self) -> bool:
        return self.entry is not None

    def __str__(self) -> str:
        ranked = [row for row in self.rows if row.reason is None]
        lines = [f"{self.key} on {self.device}: {len(ranked)} of {len(self.rows)} candidates are right"]
        lines.append(f"{'':5}{'configuration':34}{'ms':>10}{'max error':>11}{'allowed':>11}  needs")
        for place, row in enumerate(self.rows, 1):
            errors = "".join(f"{'-' if x is None else format(x, '.2e'):>11}" for x in (row.max_error, row.tolerance))
            name = f"{row.config.text():34}"
            if row.reason is None:
                mark = "*" if row.config == self.best else " "
                lines.append(f"{place:3}{mark} {name}{row.ms:10.4g}{errors}  {needs_text(row.needs)}".rstrip())
            else:
                lines.append(f"   - {name}{'':10}{errors}  {row.reason}")
        if self.entry is None or self.best is None:
            lines.append("no candidate is right, and nothing was written")
        else:
            gain = f", {self.entry.default_ms / self.entry.ms:.2f}x" if self.entry.default_ms and self.entry.ms else ""
            where = f"; written to {self.path}" if self.path else ""
            lines.append(f"best: {self.best.text()}{gain}{where}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        best = None if self.best is None else asdict(self.best)
        rows = [asdict(row) | {"needs": [_plain(needs) for needs in row.needs]} for row in self.rows]
        path = None if self.path is None else str(self.path)
        return {"key": self.key._asdict(), "device": self.device, "best": best, "path": path, "rows": rows}


def needs_text(needs: list[Compiled]) -> str:
    """What compiled kernels need, each."""
    return "; ".join(
        f"{c.kernel}: {c.registers} registers, {c.spills} spills, {c.shared_bytes} bytes shared" for c in needs
    )


def _plain(needs: Compiled) -> dict[str, Any]:
    return asdict(needs) | {"matrix": sorted(needs.matrix)}


def search(
    launcher: Callable[..., Any],
    args: tuple[Any, ...],
    *,
    reference: Callable[..., Any],
    kernel: str,
    space: Iterable[Config] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    check_args: tuple[Any, ...] | None = None,
    names: Sequence[str] | None = None,
    width: int | None = None,
    target: str | None = None,
    clock: Callable[[Callable[[], object]], float] | None = None,
    write: bool = True,
) -> Ranking:
    """Find the fastest configuration of a kernel of yours, and put it into your table, where `choose` finds it.

    Every candidate is compiled ahead, if there is a compiler for the GPU: what takes more shared memory than it has,
    or spills registers in a hot loop (in half precision, where flashgau-instruments is
    installed, which finds loops), does not run. The rest is held to the reference by the rule of `flashgau.compare`,
    and what is within tolerance is timed. A candidate that fails in any way is out, with the reason, and the next is
    tried.

    Args:
        launcher: called as `launcher(*args, **kwargs, config=candidate)`. The candidate is a `Config` that may also be
            called as `flashgau.tuning.choose` is, so that `flashgau.kernels.common.chosen_by(config)` takes it: then
            only the kernel of that name has the candidate, and others what the tables say.
        args: of the timed call.
        reference: naive PyTorch that computes the same from the same arguments, in fp64 and in their own dtype.
        kernel: the name under which the launcher asks for its configuration, and of the table's entry.
        space: the candidates; unless given, those of `default_space`.
        kwargs: further arguments of launcher and reference.
        check_args: those of the call that is held to the reference, smaller and more awkward ones than `args`, whose
            widths they should have; unless given, `args`.
        names: of the results, where there are several.
        width: the class of the table's entry; unless given, what the launcher asks for, else the first tensor's last.
        target: whose compiler is asked, such as "sm_90"; unless given, that of the tensors' GPU, and on a CPU none.
        clock: takes a call and gives its milliseconds; unless given, the median of some, the cache emptied before each
            (on a CPU, one).
        write: whether to write the table.

    Returns:
        A `Ranking`. All candidates may be out: then it is false, and the table stays as it is.

    Raises:
        TypeError: if the launcher takes no `config`.
        ValueError: for a name that no table takes, an empty space, arguments without a floating tensor, or a target
            in Triton's interpreter; and whatever the reference raises.

    Example:
        >>> import torch
        >>> from flashgau.kernels.common import Config
        >>> def launcher(x, config=None):                 # yours starts a kernel of these blocks
        ...     return 2 * x if config.block_m < 64 else 3 * x
        >>> found = search(launcher, (torch.randn(40, 16),), reference=lambda x: x + x, kernel="doubled",
        ...                space=[Config(32, 16), Config(64, 16)], write=False)
        >>> found.best, found.rows[1].config.block_m
        (Config(block_m=32, block_n=16, num_warps=4, num_stages=2, block_k=32, asynchronous=False, maxnreg=None), 64)
    """
    call = _Call(launcher, args, dict(kwargs or {}), kernel, width)
    held = args if check_args is None else check_args
    standard = Standard(launcher, reference, reference, held, call.kwargs, names=names, grad=False)
    _ = standard.exact  # whatever is wrong with the reference is not a candidate's fault
    bench, target = Bench(call.device, clock), _target(target, call.device)
    wanted = list(dict.fromkeys(default_space(call.first, kernel) if space is None else space))
    if not wanted:
        raise ValueError("search: `space` is empty; expected configurations")
    rows: list[Tried] = []
    path = tables.user_path(call.device) if write else None
    try:
        for config in wanted:
            rows.append(_try(call, config, standard, bench, target))
        had = call.in_table()
        if had is not None and had not in wanted:
            rows.append(_try(call, had, standard, bench, target))
    except KeyboardInterrupt:
        _ranked(call, rows, path)  # keeps the best so far
        raise
    return _ranked(call, rows, path)


def default_space(x: Tensor, kernel: str = "") -> list[Config]:
    """Candidates for a kernel: blocks of 16 to 128 rows by 16 to 128 keys, 4 or 8 warps, 1 to 3 stages.

    No block is larger than the longest axis before the last, or the only one; in fp32, and where the last is longer
    than 128, none is larger than 64. Interpreted, warps and stages mean nothing: there is one of each. A kernel of this
    package has the neighbours of its entry.

    Example:
        >>> len(default_space(torch.empty(2, 300, 64, dtype=torch.bfloat16, device="meta")))
        16
    """
    interpreted = tables.architecture(x.device) == "interpreter"
    if kernel in searching.BLOCKS:
        key = tables.key_for(x.device, Key(kernel, x.element_size(), _width(kernel, x)))
        return [config for _, config in searching.space(key, tables.chosen(x.device, key))]
    longest = max(x.shape[:-1] or x.shape)
    most = min(64 if x.element_size() >= 4 or x.shape[-1] > 128 else 128, max(16, _power(longest)))
    blocks = [block for block in (16, 32, 64, 128) if block <= most]
    rest = [(4, 1)] if interpreted else [(warps, stages) for warps in (4, 8) for stages in (1, 2, 3)]
    return [Config(m, n, *launch) for m, n in product(blocks, blocks) for launch in rest]


# ---- one candidate


class _Call:
    """The timed call of a launcher, and what it asks for.

    Attributes:
        first: its first floating tensor.
        device: of that.
        asked: the entries it asked for under the kernel's name, in timed calls.
        others: the names of other kernels that it asked for.
    """

    def __init__(
        self,
        launcher: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        kernel: str,
        width: int | None,
    ) -> None:
        self.launcher, self.args, self.kwargs, self.kernel, self.width = launcher, args, kwargs, kernel, width
        if not _takes_config(launcher):
            raise TypeError("search: the launcher takes no `config`; expected a function with such an argument")
        if not kernel.isidentifier() or kernel == FUSED:
            raise ValueError(f"search: `kernel` is {kernel!r}; expected a name such as my_attention_forward")
        tensors: list[Tensor] = []
        map_tensors("", (args, kwargs), lambda _, x: tensors.append(x))
        floating = [x for x in tensors if x.is_floating_point() and x.dim()]
        if not floating:
            raise ValueError("search: no argument is a floating tensor with axes; expected those of the launcher")
        self.first, self.device = floating[0], floating[0].device
        self.asked: list[Key] = []
        self.others: set[str] = set()

    @property
    def key(self) -> Key:
        """Where the entry stands: as the launcher asks for it; of one that does not ask, by the first tensor."""
        unasked = Key(self.kernel, self.first.element_size(), _width(self.kernel, self.first))
        found = self.asked[0] if self.asked else unasked
        return tables.key_for(self.device, found if self.width is None else found._replace(width=self.width))

    def in_table(self) -> Config | None:
        """What the tables have now."""
        try:
            return tables.chosen(self.device, self.key)
        except ValueError:
            return None

    def offered(self, config: Config, asked: list[Key]) -> Config:
        """A configuration that may be called as `choose` is, and then has seen who asks."""

        class Offered(Config):
            def __call__(
                _, kernel: str, x: Tensor, width: int, rows: int | None = None, options: bool = False
            ) -> Config:
                if kernel != self.kernel:
                    self.others.add(kernel)
                    return tables.in_force()(kernel, x, width, rows=rows, options=options)
                few_rows = rows is not None and rows <= tables.FEW_ROWS
                asked.append(Key(kernel, x.element_size(), width, few_rows, options))
                return config

        return Offered(*astuple(config))

    def run(self, config: Config) -> None:
        """The timed call."""
        with torch.no_grad():
            self.launcher(*self.args, **self.kwargs, config=self.offered(config, self.asked))

    def checked(self, config: Config) -> Callable[..., Any]:
        """The launcher for the call that is held to the reference.

        Raises:
            RuntimeError: when it is called, if it asks for other kernels alone.
        """
        asked: list[Key] = []

        def call(*args: Any, **kwargs: Any) -> Any:
            result = self.launcher(*args, **kwargs, config=self.offered(config, asked))
            if self.others and not asked:
                raise RuntimeError(f"the launcher asked for {', '.join(sorted(self.others))}, never for {self.kernel}")
            return result

        return call

    def needs(self, config: Config, target: str) -> list[Compiled]:
        """What the kernels of the timed call need; nothing, if they cannot be compiled ahead of it."""

        def without_values(_: str, x: Tensor) -> Tensor:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

        args, kwargs = map_tensors("", (self.args, self.kwargs), without_values)
        try:
            with torch.no_grad(), ahead.compiling_for(target) as compiled:
                self.launcher(*args, **kwargs, config=self.offered(config, []))
        except Exception:  # a launcher that reads values, or does not compile: then the call itself tells why
            return []
        return list(dict.fromkeys(compiled))


def _takes_config(launcher: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(launcher).parameters
    except ValueError:  # of a function in C nobody knows
        return True
    return "config" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _target(given: str | None, device: torch.device) -> str | None:
    """Whose compiler is asked; None for no one's."""
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    if given is not None:
        ahead.target_of(given)
        if interpreting:
            raise ValueError(f"search: `target` is {given!r}, but Triton interprets; expected no TRITON_INTERPRET")
        return given
    return ahead.target_here(device) if device.type == "cuda" and not interpreting else None


def _try(call: _Call, config: Config, standard: Standard, bench: Bench, target: str | None) -> Tried:
    """Compile, check and time one candidate, as far as it gets."""
    if bench.broken:
        return Tried(config, reason=UNTRIED)
    row = Tried(config)
    try:
        config_of(Fields({"config": asdict(config)}, "the table refuses it"))
        if target is not None:
            row = replace(row, needs=call.needs(config, target))
            may_spill = call.first.element_size() >= 4
            problems = (needs.problem(None, spills=not may_spill) for needs in row.needs)
            if reason := next(filter(None, problems), None):
                return replace(row, reason=reason)
        worst = max(standard.hold(call.checked(config)), key=lambda r: (not r.ok, r.max_error - r.tolerance))
        row = replace(row, max_error=worst.max_error, tolerance=worst.tolerance)
        if not worst.ok:
            return replace(row, reason=f"{worst.name} is off by {worst.max_error:.1e}, more than {worst.tolerance:.1e}")
        return replace(row, ms=bench.median(partial(call.run, config)))
    except Exception as error:  # whatever a candidate fails with is its fate
        return replace(row, reason=bench.failed(error))


def _ranked(call: _Call, rows: list[Tried], path: Path | None) -> Ranking:
    """The candidates in their order, and the winner in the table."""
    had = call.in_table()
    right = sorted((row for row in rows if row.reason is None), key=lambda row: (row.ms, astuple(row.config)))
    ranked = [*right, *(row for row in rows if row.reason is not None)]
    found = Ranking(call.key, tables.gpu_name(call.device), ranked)
    if not right:
        return found
    fastest = right[0]
    before = next((row for row in right if row.config == had), None)
    if before is not None and before.ms is not None and fastest.ms is not None:
        fastest = before if fastest.ms > (1 - searching.NOISE) * before.ms else fastest
    entry = TableEntry(fastest.config, fastest.ms, before.ms if before is not None else None)
    if path is not None:
        candidates.keep(call.device, path, {call.key: entry})
    return replace(found, entry=entry, path=path)


def _width(kernel: str, x: Tensor) -> int:
    """What a table has a kernel's entry by, as far as a tensor tells: 0 for those of this package without heads."""
    ours = [key.width for key in tables.shipped_table("interpreter").entries if key.kernel == kernel]
    return 0 if ours and not any(ours) else x.shape[-1]


def _power(number: int) -> int:
    """The least power of two that is not below it."""
    return 1 << max(0, number - 1).bit_length()
