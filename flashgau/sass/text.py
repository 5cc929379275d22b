"""A disassembly as instructions: cuobjdump's of NVIDIA's machine code (SASS), and the assembly of AMD's compiler."""

from __future__ import annotations

import re
from typing import NamedTuple

# The classes of instructions, in the order in which a report has them.
CLASSES = ("matrix", "fp32", "exp", "compare", "convert", "select", "predicate", "global load", "global store",
           "shared memory", "shuffle", "integer", "uniform", "synchronisation", "spill", "other")  # fmt: skip

_OPCODES = {
    "fp32": "FFMA FMUL FADD FFMA2 FMUL2 FADD2 FSWZADD",
    "exp": "MUFU",
    "compare": "FMNMX FMNMX3",
    "convert": "F2FP F2F F2I I2F I2FP HADD2 HMUL2 HFMA2 HMNMX2 PRMT FRND",
    "select": "FSEL FSETP FSET SEL",
    "predicate": "ISETP PLOP3 P2R R2P FCHK HSETP2 UISETP USEL UPLOP3",
    "global load": "LDG LDGSTS LD UTMALDG UBLKCP",
    "global store": "STG ST RED REDG ATOM ATOMG UTMASTG UTMAREDG",
    "shared memory": "LDS LDSM STS STSM MOVM ATOMS LDTM STTM",
    "shuffle": "SHFL REDUX",
    "integer": "IMAD IADD3 IADD IADD64 LEA SHF SHL SHR LOP3 MOV IMNMX VIADD VIMNMX VIMNMX3 VIADDMNMX IABS S2R CS2R "
    "BMSK SGXT LDC ULDC I2IP FLO POPC BREV LDCU",
    "synchronisation": "LDGDEPBAR DEPBAR SYNCS ARRIVES CCTL FENCE WARPGROUP WARPGROUPSET BAR WARPSYNC MEMBAR NOP YIELD "
    "ELECT BSSY BSYNC BREAK BRA CALL RET EXIT USETMAXREG NANOSLEEP VOTE VOTEU ERRBAR UTMACMDFLUSH UTCBAR PREEXIT",
    "spill": "STL LDL",
}
_CLASS_OF = {opcode: name for name, opcodes in _OPCODES.items() for opcode in opcodes.split()}
_MATRIX = re.compile(r"HGMMA|QGMMA|HMMA|IMMA|DMMA|UTC\w*MMA|v_mfma|v_smfmac")

# AMD's, by how they begin; the first that fits.
_AMD = (
    ("v_exp", "exp"), ("v_max", "compare"), ("v_min", "compare"), ("v_pk_max", "compare"), ("v_cvt", "convert"),
    ("v_perm", "convert"), ("v_cndmask", "select"), ("v_cmp", "predicate"), ("global_load", "global load"),
    ("buffer_load", "global load"), ("global_store", "global store"), ("buffer_store", "global store"),
    ("global_atomic", "global store"), ("scratch_", "spill"), ("ds_bpermute", "shuffle"), ("ds_permute", "shuffle"),
    ("ds_swizzle", "shuffle"), ("ds_", "shared memory"), ("s_waitcnt", "synchronisation"),
    ("s_barrier", "synchronisation"), ("s_cbranch", "synchronisation"), ("s_branch", "synchronisation"),
    ("s_nop", "synchronisation"), ("s_endpgm", "synchronisation"), ("s_sched", "synchronisation"),
    ("s_setprio", "synchronisation"), ("s_", "uniform"),
)  # fmt: skip
_AMD_FP32 = re.compile(r"v_(?:pk_|dot2c?_)?(?:fma|fmac|mul|add|sub)\w*f(?:32|16)")


class Instruction(NamedTuple):
    """One instruction: its address, the predicate it stands under ("!P0"; None for none), opcode and operands."""

    address: int
    predicate: str | None
    opcode: str  # with its modifiers: "HGMMA.64x64x16.F32.BF16"
    operands: str

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]

    @property
    def is_matrix(self) -> bool:
        """Whether it multiplies matrices."""
        return bool(_MATRIX.match(self.opcode))

    @property
    def class_(self) -> str:
        """One of `CLASSES`.

        Example:
            >>> Instruction(0, None, "MUFU.EX2", "R1, R2").class_, Instruction(0, None, "v_add_u32", "v1, v2").class_
            ('exp', 'integer')
        """
        if self.is_matrix:
            return "matrix"
        if self.opcode[:1].islower():
            if _AMD_FP32.match(self.opcode):
                return "fp32"
            return next((name for start, name in _AMD if self.opcode.startswith(start)), "integer")
        return _CLASS_OF.get(self.name) or ("uniform" if self.name.startswith(("U", "R2UR", "S2UR")) else "other")

    @property
    def bytes(self) -> int:
        """What each thread moves, if it is a load or a store of NVIDIA's."""
        wide = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return next((wide[word] for word in self.opcode.split(".") if word in wide), 4)


_SASS_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.MULTILINE)
_AMD_LINE = re.compile(r"^(?:\s+([a-z]\w+)(?:[ \t]+([^;\n]*))?|(\.?\w+):)", re.MULTILINE)


def parse(disassembly: str) -> list[Instruction]:
    """The instructions of a kernel: of the largest function, where a file has several.

    Example:
        >>> parse("        /*0f10*/              @!P1 BRA 0xe00 ;    /* 0x... */")
        [Instruction(address=3856, predicate='!P1', opcode='BRA', operands='0xe00')]
    """
    if "amdgcn" in disassembly or "v_mfma" in disassembly:
        return _parse_amd(disassembly)
    functions = (
        [Instruction(int(m[1], 16), m[2], m[3], m[4]) for m in _SASS_LINE.finditer(part)]
        for part in disassembly.split("Function :")
    )
    return max(functions, key=len)


def _parse_amd(assembly: str) -> list[Instruction]:
    """With numbers for addresses, and labels replaced by them."""
    labels: dict[str, int] = {}
    found: list[Instruction] = []
    for m in _AMD_LINE.finditer(assembly):
        if m[3] is not None:
            labels[m[3]] = len(found)
        elif "_" in m[1]:  # directives have none or begin with a point
            found.append(Instruction(len(found), None, m[1], (m[2] or "").strip()))
    return [i._replace(operands=hex(labels[i.operands])) if i.operands in labels else i for i in found]
