"""What an executed kernel may do wrong."""

from __future__ import annotations

from .text import Place


class UnknownInstruction(RuntimeError):
    """An instruction, a form of one or a kind of launch that is not executed here; the message names it."""


class Fault(RuntimeError):
    """A kernel did what hardware leaves undefined, or what its author cannot have meant.

    Attributes:
        kind: one of `KINDS`.
        kernel: its name.
        source: the line of the source, from Triton's `.loc`.
        instruction: in PTX.
        block: whose thread it was.
        thread: within the block.
        address: in memory, or within shared memory; None where there is none.
    """

    kind: str
    kernel: str
    instruction: str
    source: str
    block: tuple[int, int, int]
    thread: int
    address: int | None

    def __init__(
        self,
        kind: str,
        text: str,
        *,
        kernel: str = "",
        place: Place | None = None,
        instruction: str = "",
        block: tuple[int, int, int] = (0, 0, 0),
        thread: int = 0,
        address: int | None = None,
    ) -> None:
        assert kind in KINDS, kind
        self.kind, self.kernel, self.instruction = kind, kernel, instruction
        self.source = place.source if place is not None else ""
        self.block, self.thread, self.address = block, thread, address
        where = f"{kernel} at {self.source} (line {place.line} of the PTX)" if place is not None else kernel
        at = "" if address is None else f", address {address:#x}"
        super().__init__(f"{kind}: {text}\n  {where}\n  block {block}, thread {thread}{at}\n  {instruction}")


KINDS = {
    "outside": "a global access outside every tensor that the launch was given",
    "misaligned": "an access whose address is no multiple of its size",
    "shared outside": "a shared access outside what the kernel has",
    "unwritten": "shared memory read before it was written",
    "race": "two threads at one place of shared memory, one of them writing, without a barrier between",
    "early read": "what an asynchronous copy or product writes was read before its wait",
    "early write": "shared memory was written while an asynchronous copy or product still used it",
    "barrier": "a barrier that not all threads of the block reach",
    "diverged": "an instruction of a whole warp that not all of its threads reach",
    "two writers": "two blocks wrote one place of global memory",
    "two blocks": "a block read what another one wrote, or wrote what another one had read",
    "endless": "the kernel did not end within its budget of instructions",
}
