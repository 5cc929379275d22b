"""Turns the instructions of a basic block into a Python function on numpy arrays: one element for each thread.

Registers are unsigned integers of their width (predicates are bool) in a list `R`, never changed in place. Each block
becomes two functions: one for all threads, and one for some, which keeps the registers of the others.
"""

from __future__ import annotations

import re
from typing import Any

from .arithmetic import Arithmetic
from .operands import TYPES, WIDTH, dtype_of
from .text import Address

# Says something about caches, ordering or scope, and nothing about the values here.
_HINTS = {"ca", "cg", "cs", "cv", "lu", "wb", "wt", "nc", "volatile", "relaxed", "acquire", "release", "acq_rel",
          "weak", "gpu", "sys", "cta", "cluster", "uni", "sync", "aligned"}  # fmt: skip


class Translator(Arithmetic):
    """Also of what touches memory, other threads and matrices, which the machine `m` does."""

    # ---- memory ----

    def _access(self, parts: list[str]) -> tuple[str, str, int]:
        """State space, type and number of values of a load or store."""
        kind = parts[-1]
        rest = [p for p in parts[1:-1] if p not in _HINTS and not p.startswith(("L1::", "L2::"))]
        count = next((int(p[1:]) for p in rest if p in ("v2", "v4", "v8")), 1)
        spaces = [p for p in rest if p not in ("v2", "v4", "v8")]
        if kind not in TYPES or len(spaces) != 1:
            raise self._unknown()
        return spaces[0].split("::")[0], kind, count

    def _address(self, address: Any, space: str) -> str:
        if not isinstance(address, Address):
            raise self._unknown()
        kind = "b32" if space == "shared" else "b64"
        base = self._value(address.base, kind)
        if not self._is_register(address.base):
            base = f"m.spread({base})"
        return base if not address.offset else f"{base} + {self._immediate(str(address.offset), kind)}"

    def _ld(self, parts: list[str], target: Any, address: Any, *rest: Any) -> None:
        space, kind, count = self._access(parts)
        size = WIDTH[kind] // 8
        if space == "param":
            parameter = self.parameters[address.base]
            text = f"m.parameter({parameter.offset + address.offset}, {dtype_of(kind)})"
            self._store(target, text, kind, spread=True)
            return
        if space not in ("global", "shared"):
            raise self._unknown()
        where = self._address(address, space)
        self.lines.append(f"t = m.load_{space}({self.number}, {where}, {size}, {count}, {self._threads})")
        for i, one in enumerate(target if isinstance(target, tuple) else (target,)):
            self._store(one, f"t[{i}].view({dtype_of(kind)})", kind)

    def _st(self, parts: list[str], address: Any, source: Any, *rest: Any) -> None:
        space, kind, _ = self._access(parts)
        if space not in ("global", "shared"):
            raise self._unknown()
        size = WIDTH[kind] // 8
        values = []
        for one in source if isinstance(source, tuple) else (source,):
            value = self._value(one, f"b{size * 8}")
            values.append(f"m.spread({value})" if not self._is_register(one) else value)
        where = self._address(address, space)
        self.lines.append(f"m.store_{space}({self.number}, {where}, [{', '.join(values)}], {size}, {self._threads})")

    def _atom(self, parts: list[str], *operands: Any) -> None:
        """atom and red on global memory: each thread after the other."""
        kind, how = (
            parts[-1],
            next((p for p in parts if p in ("add", "min", "max", "exch", "cas", "and", "or", "xor")), None),
        )
        if how is None or "global" not in parts or kind in ("f16x2", "bf16x2") or any(p in ("v2", "v4") for p in parts):
            raise self._unknown()
        target, address, values = (
            (None, operands[0], operands[1:]) if parts[0] == "red" else (operands[0], operands[1], operands[2:])
        )
        texts = ", ".join(f"m.spread({self._value(v, kind)})" for v in values)
        where = self._address(address, "global")
        self.lines.append(f"t = m.atomic({self.number}, {how!r}, {where}, [{texts}], {self._threads})")
        if target is not None:
            self._store(target, f"t.view({dtype_of(kind)})", kind)

    _red = _atom

    def _cp(self, parts: list[str], *operands: Any) -> None:
        if parts[1] != "async" or parts[2] == "mbarrier":
            raise self._unknown()
        if "bulk" in parts:
            self._bulk(parts, *operands)
        elif "commit_group" in parts:
            self.lines.append(f"m.shared.commit({self._threads})")
        elif "wait_group" in parts or "wait_all" in parts:
            newest = int(str(operands[0]), 0) if operands else 0
            self.lines.append(f"m.shared.wait({self._threads}, {newest}, uncommitted={'wait_all' in parts})")
        else:
            target, source, size, *rest = operands
            taken = f"m.spread({self._value(rest[0], 'u32')})" if rest else "None"
            self.lines.append(
                f"m.copy({self.number}, {self._address(target, 'shared')}, {self._address(source, 'global')}, "
                f"{int(str(size), 0)}, {taken}, {self._threads})"
            )

    def _bulk(self, parts: list[str], *operands: Any) -> None:
        """cp.async.bulk: by tensor maps, and their groups."""
        if "commit_group" in parts:
            self.lines.append(f"m.bulk.commit({self._threads})")
        elif "wait_group" in parts:
            self.lines.append(f"m.bulk.wait({self._threads}, {int(str(operands[0]), 0)})")
        elif "tensor" in parts and len(operands) == 3 and any(p.startswith("mbarrier") for p in parts):
            target, source, barrier = operands
            where, mapped, corner = self._address(target, "shared"), *self._mapped(source)
            rest = f"{where}, {mapped}, {corner}, {self._address(barrier, 'shared')}"
            self.lines.append(f"m.bulk.load({self.number}, {rest}, {self._threads})")
        elif "tensor" in parts and len(operands) == 2 and "bulk_group" in parts and "reduce" not in parts:
            mapped, corner = self._mapped(operands[0])
            rest = f"{mapped}, {corner}, {self._address(operands[1], 'shared')}"
            self.lines.append(f"m.bulk.store({self.number}, {rest}, {self._threads})")
        else:
            raise self._unknown()

    def _mapped(self, operand: Any) -> tuple[str, str]:
        """`[map, {corner}]`: the map's address, and the corner's coordinates."""
        found = re.fullmatch(r"\s*(\S+)\s*,\s*\{(.*)\}\s*", operand.base) if isinstance(operand, Address) else None
        if found is None:
            raise self._unknown()
        corner = [f"m.spread({self._value(x.strip(), 'b32')})" for x in found[2].split(",")]
        return f"m.spread({self._value(found[1], 'b64')})", f"[{', '.join(corner)}]"

    def _mbarrier(self, parts: list[str], *operands: Any) -> None:
        how = parts[1]
        if how == "init":
            where, count = self._address(operands[0], "shared"), self._value(operands[1], "u32")
            self.lines.append(f"m.bulk.init({self.number}, {where}, m.spread({count}), {self._threads})")
        elif how == "inval":
            self.lines.append(f"m.bulk.end({self.number}, {self._address(operands[0], 'shared')}, {self._threads})")
        elif how == "arrive" and operands[0] == "_" and parts[2:3] != ["noComplete"]:
            count = f"m.spread({self._value(operands[2], 'u32')})" if "expect_tx" in parts else "None"
            where = self._address(operands[1], "shared")
            self.lines.append(f"m.bulk.arrive({self.number}, {where}, {count}, {self._threads})")
        elif how in ("try_wait", "test_wait") and "parity" in parts:
            target, address, parity = operands[:3]
            where = self._address(address, "shared")
            self.lines.append(
                f"t = m.bulk.waited({self.number}, {where}, m.spread({self._value(parity, 'u32')}), {self._threads})"
            )
            self._store(target, "t", "pred")
        else:
            raise self._unknown()

    def _tensormap(self, parts: list[str], *operands: Any) -> None:
        if parts[1] == "replace" and any(p.startswith("shared") for p in parts):
            address, *rest = operands
            place = int(str(rest[0]), 0) if len(rest) == 2 else 0
            where, value = self._address(address, "global"), self._value(rest[-1], parts[-1])
            self.lines.append(
                f"m.bulk.replace({self.number}, {parts[3]!r}, {where}, {place}, {value}, {self._threads})"
            )
        elif parts[1] == "cp_fenceproxy":
            target, source = (self._address(x, "global") for x in operands[:2])
            self.lines.append(f"m.bulk.publish({self.number}, {target}, {source}, {self._threads})")
        else:
            raise self._unknown()

    def _fence(self, parts: list[str], *operands: Any) -> None:
        if "proxy" in parts and "async" in parts:
            self.lines.append(f"m.proxy_fence({self._threads})")

    def _nothing(self, parts: list[str], *operands: Any) -> None:
        """What has no effect on values: hints, and memory orders that the shadow does not need."""

    _membar = _prefetch = _nanosleep = _discard = _createpolicy = _nothing

    # ---- threads of a warp, of a block, and matrices ----

    def _bar(self, parts: list[str], *operands: Any) -> None:
        if "warp" in parts:
            self.lines.append(f"m.warp_barrier({self.number}, {self._threads})")
            return
        if self.x.predicate is not None or not operands or {"arrive", "red"} & set(parts):
            raise self._unknown()
        which, *count = (self._value(x, "u32") for x in operands)
        self.lines.append(
            f"m.barrier({self.number}, k, m.spread({which}), {f'm.spread({count[0]})' if count else 'None'})"
        )

    _barrier = _bar

    def _shfl(self, parts: list[str], *operands: Any) -> None:
        target, *rest = operands
        valid = rest.pop(0) if len(operands) == 6 else None
        value, by, bounds, _ = (self._value(x, "b32") for x in rest)
        self.lines.append(f"m.whole({self.number}, {self._threads})")
        self.lines.append(f"t, v = m.shuffle({parts[2]!r}, m.spread({value}), {by}, {bounds})")
        self._store(target, "t", "b32")
        if valid is not None:
            self._store(valid, "v", "pred")

    def _vote(self, parts: list[str], target: Any, condition: Any, members: Any) -> None:
        how = parts[2]
        self.lines.append(f"m.whole({self.number}, {self._threads})")
        self._store(
            target, f"m.vote({how!r}, m.spread({self._value(condition, 'pred')}))", "b32" if how == "ballot" else "pred"
        )

    def _redux(self, parts: list[str], target: Any, value: Any, members: Any) -> None:
        self.lines.append(f"m.whole({self.number}, {self._threads})")
        self._store(target, f"m.reduce({parts[2]!r}, {self._value(value, parts[-1])})", parts[-1])

    def _elect(self, parts: list[str], target: Any, chosen: Any, members: Any) -> None:
        self._store(target, "m.spread(u4(0))", "b32")
        self._store(chosen, "m.laneid == 0", "pred")

    def _registers(self, names: tuple[str, ...]) -> str:
        return "[" + ", ".join(f"m.warps({self._value(x, 'b32')})" for x in names) + "]"

    def _results(self, names: tuple[str, ...]) -> None:
        for i, one in enumerate(names):
            self._store(one, f"m.flat(t[{i}])", "b32")

    def _ldmatrix(self, parts: list[str], target: Any, address: Any) -> None:
        if "b16" not in parts or "m8n8" not in parts:
            raise self._unknown()
        where = self._address(address, "shared")
        names = target if isinstance(target, tuple) else (target,)
        self.lines.append(
            f"t = m.load_matrices({self.number}, {where}, {len(names)}, {'trans' in parts}, {self._threads})"
        )
        self._results(names)

    def _stmatrix(self, parts: list[str], address: Any, source: Any) -> None:
        if "b16" not in parts or "m8n8" not in parts:
            raise self._unknown()
        names = source if isinstance(source, tuple) else (source,)
        where = self._address(address, "shared")
        self.lines.append(
            f"m.store_matrices({self.number}, {where}, {self._registers(names)}, {'trans' in parts}, {self._threads})"
        )

    def _mma(self, parts: list[str], target: Any, a: Any, b: Any, c: Any) -> None:
        shape, kind = parts[3], parts[-2]
        if (shape, kind) not in (("m16n8k16", "f16"), ("m16n8k16", "bf16"), ("m16n8k8", "tf32")) or parts[-1] != "f32":
            raise self._unknown()
        self.lines.append(f"m.whole({self.number}, {self._threads})")
        self.lines.append(f"t = m.mma({self._registers(a)}, {self._registers(b)}, {self._registers(c)}, {kind!r})")
        self._results(target)

    def _wgmma(self, parts: list[str], *operands: Any) -> None:
        self.lines.append(f"m.whole({self.number}, {self._threads})")
        if "fence" in parts:
            return
        if "commit_group" in parts:
            self.lines.append(f"m.commit_products({self._threads})")
            return
        if "wait_group" in parts:
            self.lines.append(f"m.wait_products({self._threads}, {int(str(operands[0]), 0)})")
            return
        shape, kind = parts[4], parts[-1]
        columns, depth = (int(x) for x in shape.split("n")[1].split("k"))
        if parts[5] != "f32" or (kind, depth) not in (("f16", 16), ("bf16", 16), ("tf32", 8)):
            raise self._unknown()
        target, a, b, scale, sign_a, sign_b, *transposed = operands
        if sign_a != "1" or sign_b != "1":
            raise self._unknown()
        left = self._registers(a) if isinstance(a, tuple) else self._value(a, "b64")
        trans_a, trans_b = ([0, 0] + [int(str(x)) for x in transposed])[-2:]
        numbers_of = [self.numbers[x] for x in target]
        add = self._value(scale, "pred") if scale in self.numbers else f"m.spread(np.bool_({int(str(scale), 0) != 0}))"
        self.lines.append(
            f"t = m.wgmma({self.number}, {numbers_of}, {self._registers(target)}, {left}, {self._value(b, 'b64')}, "
            f"{add}, ({columns}, {kind!r}, {trans_a}, {trans_b}), {self._threads})"
        )
        self._results(target)
