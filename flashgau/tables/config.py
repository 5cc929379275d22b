"""The configuration of one kernel's launch, and the functions that give it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# Every launch enables fused multiply-add explicitly: Triton's default differs between versions.
FUSED_ADDITION = {"enable_fp_fusion": True}


def is_register_count(value: object) -> bool:
    """Whether `Config.maxnreg` may be this: what ptxas rounds to nothing else."""
    return type(value) is int and 24 <= value <= 256 and value % 8 == 0


@dataclass(frozen=True)
class Config:
    """How one kernel is launched: its block (of queries by keys, of rows by columns), warps, stages of its pipeline.

    Blocks of what is multiplied are of 16 at least. A kernel without products takes smaller ones, too.

    `asynchronous` is for devices whose products and copies run beside other instructions, as Hopper's do: attention's
    forward, and dV of heads wider than 128 in half precision, begin the product of a block together with the scores of
    the next, whose exponentials hide it; forward and dQ copy keys and values through descriptors where their strides
    allow. Other kernels ignore it.

    `maxnreg` is the largest number of registers that a thread may have, on NVIDIA GPUs: fewer let more programs share a
    multiprocessor, and may spill. None leaves it to the compiler.

    Raises:
        ValueError: for a block or a number of warps that is no power of two, stages that are no positive number, a
            value of `asynchronous` that is not a bool, or `maxnreg` that is no multiple of 8 from 24 to 256.

    Example:
        >>> Config(block_m=48, block_n=64)
        Traceback (most recent call last):
            ...
        ValueError: Config: `block_m` is 48; expected a power of two
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2
    block_k: int = 32  # of a product of matrices: how much of the inner axis at a time
    asynchronous: bool = False
    maxnreg: int | None = None

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k", "num_warps"):
            size = getattr(self, name)
            if type(size) is not int or size < 1 or size & (size - 1):
                raise ValueError(f"Config: `{name}` is {size!r}; expected a power of two")
        if type(self.num_stages) is not int or self.num_stages < 1:
            raise ValueError(f"Config: `num_stages` is {self.num_stages!r}; expected a positive number")
        if type(self.asynchronous) is not bool:
            raise ValueError(f"Config: `asynchronous` is {self.asynchronous!r}; expected True or False")
        if self.maxnreg is not None and not is_register_count(self.maxnreg):
            raise ValueError(f"Config: `maxnreg` is {self.maxnreg!r}; expected None or a multiple of 8 from 24 to 256")

    def launch(self) -> dict[str, int]:
        """The keywords of a Triton launch."""
        limit = {} if self.maxnreg is None else {"maxnreg": self.maxnreg}  # which compilers for AMD do not know
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit, **FUSED_ADDITION}

    def text(self) -> str:
        """It in a few words.

        Example:
            >>> Config(64, 32, 4, 1).text()
            '64x32x32, 4 warps, 1 stage'
        """
        stages = f"{self.num_stages} stage" + "s" * (self.num_stages != 1)
        text = f"{self.block_m}x{self.block_n}x{self.block_k}, {self.num_warps} warps, {stages}"
        text += ", asynchronous" * self.asynchronous
        return text if self.maxnreg is None else f"{text}, {self.maxnreg} registers"


# Called by a launcher for each kernel that it starts: (kernel, first tensor, widest head, traits) -> Config.
Choose = Callable[..., Config]
