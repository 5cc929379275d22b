"""Instructions that compute: one expression on numpy arrays for each, by type."""

from __future__ import annotations

from typing import Any

from .operands import TYPES, WIDTH, Operands, dtype_of

_HALVES = ("f16", "bf16", "f16x2", "bf16x2")


class Arithmetic(Operands):
    """The methods have the names of instructions, and take what stands between the dots, then the operands."""

    # ---- arithmetic ----

    def _arithmetic(self, parts: list[str], forms: dict[str, str], target: Any, *operands: Any) -> None:
        """By type: integers, fp32 with `.ftz` and `.sat`, fp64, and halves, which are computed in fp32 or as fma."""
        kind = parts[-1]
        if kind not in TYPES:
            raise self._unknown()
        in_halves = forms.get("half") if kind in _HALVES else None  # on their bits, not on fp32 of them
        form = forms.get(kind) or in_halves or forms.get("float" if kind in ("f32", "f64", *_HALVES) else "int")
        if form is None:
            raise self._unknown()
        if kind in ("f32", "f64"):
            values = [self._value(x, kind) for x in operands]
            if "ftz" in parts:
                values = [f"n.flushed({x})" for x in values]
            text = form.format(*values)
            text = f"n.flushed({text})" if "ftz" in parts else text
            text = f"n.saturated({text})" if "sat" in parts else text
            text = f"n.canonical({text})" if kind == "f32" and parts[0] not in ("abs", "neg", "copysign") else text
            self._store(target, text, kind, spread=self._spreads(*operands))
        elif kind in _HALVES:
            half = kind.removesuffix("x2")
            results = []
            for values in self._halves(operands, kind):
                if in_halves:
                    results.append(form.format(*values, kind=half))
                else:
                    wide = [f"n.widened({x}, {half!r})" for x in values]
                    results.append(f"n.halved({form.format(*wide)}, {half!r}, relu={'relu' in parts})")
            text = " | ".join(f"(({x}).astype(u4) << u4({16 * i}))" for i, x in enumerate(results))
            text = results[0] if len(results) == 1 else text
            self._store(target, text, kind, spread=self._spreads(*operands))
        else:
            self._computed(form, kind, target, *operands)

    def _halves(self, operands: tuple[Any, ...], kind: str) -> list[list[str]]:
        """Bits of the operands' halves: one list, or of pairs that of the lower and that of the upper ones."""
        values = [self._value(x, kind) for x in operands]
        if not kind.endswith("x2"):
            return [values]
        return [[f"({x} >> u4({shift})).astype(u2)" for x in values] for shift in (0, 16)]

    def _add(self, parts: list[str], target: Any, *operands: Any) -> None:
        self._arithmetic(parts, {"int": "{0} + {1}", "float": "{0} + {1}"}, target, *operands)

    def _sub(self, parts: list[str], target: Any, *operands: Any) -> None:
        self._arithmetic(parts, {"int": "{0} - {1}", "float": "{0} - {1}"}, target, *operands)

    def _mul(self, parts: list[str], target: Any, *operands: Any) -> None:
        kind = parts[-1]
        if "wide" in parts:
            wide = f"{kind[0]}{2 * WIDTH[kind]}"
            dtype = dtype_of(wide)
            self._computed(f"({{0}}).astype({dtype}) * ({{1}}).astype({dtype})", kind, target, *operands, result=wide)
        elif "hi" in parts:
            self._computed("n.high_product({0}, {1})", kind, target, *operands)
        else:
            self._arithmetic(parts, {"int": "{0} * {1}", "float": "{0} * {1}"}, target, *operands)

    def _mad(self, parts: list[str], target: Any, a: Any, b: Any, c: Any) -> None:
        kind = parts[-1]
        if "wide" in parts:
            wide = f"{kind[0]}{2 * WIDTH[kind]}"
            dtype = dtype_of(wide)
            text = f"{self._value(a, kind)}.astype({dtype}) * {self._value(b, kind)}.astype({dtype})"
            self._store(target, f"{text} + {self._value(c, wide)}", wide, spread=self._spreads(a, b, c))
        elif "hi" in parts:
            self._computed("n.high_product({0}, {1}) + {2}", kind, target, a, b, c)
        elif kind in ("f32", "f64"):
            self._fma(parts, target, a, b, c)
        else:
            self._computed("{0} * {1} + {2}", kind, target, a, b, c)

    def _fma(self, parts: list[str], target: Any, *operands: Any) -> None:
        half = "n.half_fma({0}, {1}, {2}, {kind!r})"
        self._arithmetic(
            parts, {"f32": "n.fma({0}, {1}, {2})", "f64": "n.wide_fma({0}, {1}, {2})", "half": half}, target, *operands
        )

    def _div(self, parts: list[str], target: Any, *operands: Any) -> None:
        exact = "rn" in parts or parts[-1] == "f64"
        forms = {
            "int": "n.quotient({0}, {1})",
            "float": "{0} / {1}" if exact else "m.freedom.approximate('div', {0}, {1})",
        }
        self._arithmetic(parts, forms, target, *operands)

    def _rem(self, parts: list[str], target: Any, *operands: Any) -> None:
        self._arithmetic(parts, {"int": "n.remainder({0}, {1})"}, target, *operands)

    def _min(self, parts: list[str], target: Any, *operands: Any) -> None:
        self._extreme(parts, "smaller", "minimum", target, *operands)

    def _max(self, parts: list[str], target: Any, *operands: Any) -> None:
        self._extreme(parts, "larger", "maximum", target, *operands)

    def _extreme(self, parts: list[str], name: str, integers: str, target: Any, *operands: Any) -> None:
        whole = f"np.{integers}({{0}}, {{1}})"
        if "relu" in parts and parts[-1][0] == "s":
            whole = f"np.maximum({whole}, {dtype_of(parts[-1])}(0))"
        form = f"np.{integers}({{0}}, {{1}})" if "NaN" in parts else f"n.{name}(*np.broadcast_arrays({{0}}, {{1}}))"
        self._arithmetic([p for p in parts if p != "NaN"], {"int": whole, "float": form}, target, *operands)

    def _abs(self, parts: list[str], target: Any, *operands: Any) -> None:
        self._arithmetic(parts, {"int": "np.abs({0})", "float": "np.abs({0})"}, target, *operands)

    def _neg(self, parts: list[str], target: Any, *operands: Any) -> None:
        self._arithmetic(parts, {"int": "-{0}", "float": "-{0}"}, target, *operands)

    def _copysign(self, parts: list[str], target: Any, *operands: Any) -> None:
        self._arithmetic(parts, {"float": "np.copysign({1}, {0})"}, target, *operands)

    def _approximate(self, parts: list[str], target: Any, *operands: Any) -> None:
        if parts[-1] != "f32":
            raise self._unknown()
        exact = {"rcp": "f4(1) / {0}", "sqrt": "np.sqrt({0})"}.get(parts[0]) if "rn" in parts else None
        self._arithmetic(parts, {"f32": exact or f"m.freedom.approximate({parts[0]!r}, {{0}})"}, target, *operands)

    _ex2 = _lg2 = _rcp = _rsqrt = _sqrt = _sin = _cos = _tanh = _approximate

    # ---- bits ----

    def _logical(self, parts: list[str], target: Any, *operands: Any) -> None:
        sign = {"and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}", "not": "~{0}"}[parts[0]]
        self._computed(sign, parts[-1], target, *operands)

    _and = _or = _xor = _not = _logical

    def _lop3(self, parts: list[str], target: Any, a: Any, b: Any, c: Any, table: str) -> None:
        x, y, z = (self._value(v, "b32") for v in (a, b, c))
        terms = [
            f"({'' if i & 4 else '~'}{x} & {'' if i & 2 else '~'}{y} & {'' if i & 1 else '~'}{z})"
            for i in range(8)
            if int(table.rstrip("U"), 0) >> i & 1
        ]
        self._store(target, " | ".join(terms) or f"({x} ^ {x})", "b32", spread=self._spreads(a, b, c))

    def _shl(self, parts: list[str], target: Any, value: Any, by: Any) -> None:
        self._shift(parts, "shifted_left", "<<", target, value, by)

    def _shr(self, parts: list[str], target: Any, value: Any, by: Any) -> None:
        self._shift(parts, "shifted_right", ">>", target, value, by)

    def _shift(self, parts: list[str], name: str, sign: str, target: Any, value: Any, by: Any) -> None:
        kind = parts[-1]
        width = WIDTH[kind]
        if self._is_register(by):
            text = f"n.{name}({self._value(value, kind)}, {self._value(by, 'u32')})"
        else:
            amount = int(str(by).rstrip("U"), 0)
            if kind[0] == "s":
                amount = min(amount, width - 1)
            dtype = dtype_of(kind)
            text = (
                f"{self._value(value, kind)} {sign} {dtype}({amount})"
                if amount < width
                else f"{self._value(value, kind)} & {dtype}(0)"
            )
        self._store(target, text, kind, spread=self._spreads(value, by))

    def _bfe(self, parts: list[str], target: Any, value: Any, start: Any, length: Any) -> None:
        text = f"n.field_of({self._value(value, parts[-1])}, {self._value(start, 'u32')}, {self._value(length, 'u32')})"
        self._store(target, text, parts[-1], spread=self._spreads(value, start, length))

    def _bfi(self, parts: list[str], target: Any, a: Any, b: Any, start: Any, length: Any) -> None:
        values = [
            self._value(a, parts[-1]),
            self._value(b, parts[-1]),
            self._value(start, "u32"),
            self._value(length, "u32"),
        ]
        self._store(target, f"n.inserted({', '.join(values)})", parts[-1], spread=self._spreads(a, b, start, length))

    def _prmt(self, parts: list[str], target: Any, a: Any, b: Any, selector: Any) -> None:
        self._computed("n.permuted({0}, {1}, {2})", "b32", target, a, b, selector)

    def _popc(self, parts: list[str], target: Any, value: Any) -> None:
        self._computed("np.bitwise_count({0}).astype(u4)", parts[-1], target, value, result="b32")

    # ---- comparisons and moves ----

    def _setp(self, parts: list[str], *operands: Any) -> None:
        """One predicate, or two: the comparison and its opposite, or those of a pair of halves."""
        kind, how = parts[-1], parts[1]
        boolean = next((p for p in parts[2:-1] if p in ("and", "or", "xor")), None)
        count = len(operands) - 2 - bool(boolean)
        if kind not in TYPES or count not in (1, 2):
            raise self._unknown()
        targets, (a, b, *third) = operands[:count], operands[count:]
        floating = kind in ("f32", "f64", *_HALVES)
        texts = []
        for x, y in self._halves((a, b), kind):
            if kind in _HALVES:
                x, y = (f"n.widened({v}, {kind.removesuffix('x2')!r})" for v in (x, y))
            if "ftz" in parts:
                x, y = f"n.flushed({x})", f"n.flushed({y})"
            texts.append(self._compared(how, x, y, floating=floating))
        if len(texts) == 1:
            texts.append(f"~({texts[0]})")
        if boolean is not None:
            sign, other = {"and": "&", "or": "|", "xor": "^"}[boolean], self._value(third[0], "pred")
            texts = [f"({text}) {sign} {other}" for text in texts]
        self.lines.append(f"t = {texts[0]}" if count == 1 else f"t, v = {texts[0]}, {texts[1]}")
        for target, found in zip(targets, ("t", "v"), strict=False):
            self._store(target, found, "pred", spread=self._spreads(a, b))

    def _compared(self, how: str, x: str, y: str, *, floating: bool) -> str:
        """An expression: of floats, those that end in u hold where one is NaN, and the others do not."""
        signs = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">",
                 "hs": ">="}  # fmt: skip
        opposite = {"ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}
        if floating and how == "ne":
            return f"({x} < {y}) | ({x} > {y})"
        if floating and how in opposite:
            return f"~({x} {opposite[how]} {y})"
        special = {
            "neu": f"({x} != {y})",
            "equ": f"~(({x} < {y}) | ({x} > {y}))",
            "num": f"({x} == {x}) & ({y} == {y})",
            "nan": f"({x} != {x}) | ({y} != {y})",
        }
        if floating and how in special:
            return special[how]
        if how not in signs:
            raise self._unknown()
        return f"({x} {signs[how]} {y})"

    def _selp(self, parts: list[str], target: Any, a: Any, b: Any, condition: Any) -> None:
        kind = parts[-1]
        text = f"where({self._value(condition, 'pred')}, {self._value(a, kind)}, {self._value(b, kind)})"
        self._store(target, text, kind, spread=self._spreads(condition))

    def _mov(self, parts: list[str], target: Any, source: Any) -> None:
        kind = parts[-1]
        width = WIDTH[kind]
        if isinstance(source, tuple):  # packed
            part = width // len(source)
            dtype = dtype_of(kind)
            values = [f"({self._value(x, f'b{part}')}).astype({dtype})" for x in source]
            text = " | ".join(f"({v} << {dtype}({i * part}))" if i else v for i, v in enumerate(values))
            self._store(target, text, kind, spread=self._spreads(*source))
        elif isinstance(target, tuple):
            part = width // len(target)
            value, dtype = self._value(source, kind), dtype_of(kind)
            for i, one in enumerate(target):
                shifted = f"({value} >> {dtype}({i * part}))" if i else value
                self._store(one, f"{shifted}.astype(u{part // 8})", f"b{part}", spread=self._spreads(source))
        else:
            self._store(target, self._value(source, kind), kind, spread=self._spreads(source))

    def _cvta(self, parts: list[str], target: Any, source: Any) -> None:
        self._mov(["mov", parts[-1]], target, source)

    def _cvt(self, parts: list[str], target: Any, *sources: Any) -> None:
        kinds = [p for p in parts[1:] if p in TYPES]
        if len(kinds) != 2:
            raise self._unknown()
        to, source = kinds
        rounding = next((p for p in parts if p in ("rn", "rz", "rni", "rzi", "rmi", "rpi")), None)
        values = [self._value(x, source) for x in sources]
        spread = self._spreads(*sources)
        if "ftz" in parts and source == "f32":
            values = [f"n.flushed({v})" for v in values]
        if to in ("f16x2", "bf16x2") and source == "f32" and len(values) == 2:
            rest = f"{to.removesuffix('x2')!r}, towards_zero={rounding == 'rz'}, relu={'relu' in parts}"
            high, low = (f"n.halved({v}, {rest}).astype(u4)" for v in values)
            self._store(target, f"({high} << u4(16)) | {low}", to, spread=spread)
            return
        if len(values) != 1 or {to, source} & {"f16x2", "bf16x2", "tf32", "f32x2", "b8", "b128"}:
            raise self._unknown()
        (value,) = values
        if source in ("f16", "bf16"):
            value, source = f"n.widened({value}, {source!r})", "f32"
        whole, floating = to[0] in "us", source[0] == "f"
        steps = {"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}
        if to in ("f16", "bf16"):
            narrow = value if source == "f32" else f"({value}).astype(f4)"
            text = f"n.halved({narrow}, {to!r}, towards_zero={rounding == 'rz'}, relu={'relu' in parts})"
        elif whole and floating:
            text = f"n.to_integer({value}, {to!r}, {rounding or 'rzi'!r})"
        elif whole and "sat" in parts:
            raise self._unknown()
        elif floating and to == source:
            text = f"{steps[rounding]}({value})" if rounding in steps else value
        elif rounding == "rz":
            raise self._unknown()
        else:
            text = f"({value}).astype({dtype_of(to)})"
        if to == "f32" and "sat" in parts:
            text = f"n.saturated({text})"
        self._store(target, text, to, spread=spread)
