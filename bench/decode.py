"""Decoding token by token after contexts of growing length: FLASH's constant state beside a key/value cache."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashgau
from bench import report, transformer
from bench.cases import FORWARD, BenchCase, Build, Goal, Operation, Problem, Provider
from flashgau.models import CausalLM, ModelConfig, ModelState
from flashgau.models.config import CONSTANT_STATE
from flashgau.nn import KeyValueCache, UnitState


def cases(device: str, quick: bool) -> list[BenchCase]:
    if quick:
        return [_case("flash-tiny", 1, n, "fp32", 8, 48, 128) for n in (128, 256)]
    lengths = (2**10, 2**11, 2**12, 2**14, 2**16, 2**17)
    mine = ("flashgau-triton",) if device == "cuda" else ("flashgau-eager", "flashgau-eager-compiled")
    flat = {lengths[-1]: tuple(Goal(who, None, "flat", FORWARD, 1.1, since=lengths[0]) for who in mine)}
    faster = {n: tuple(Goal(who, "transformer++", "speed", FORWARD, 1.0) for who in mine) for n in lengths[1:]}
    model, dtype = ("flash-base", "bf16") if device == "cuda" else ("flash-small", "fp32")
    # As many tokens as a chunk has, which is closed once; of several sequences more, so that copying their states first
    # counts for little.
    chunk = ModelConfig.named(model).chunk_size
    one = [_case(model, 1, n, dtype, chunk, 8192, 1024, faster.get(n, ()) + flat.get(n, ())) for n in lengths]
    return [*one, _case(model, 16, 2**12, dtype, 2 * chunk, 1024, 1024)]


def _case(
    model: str, batch: int, n: int, dtype: str, steps: int, piece: int, check_length: int, goals: tuple[Goal, ...] = ()
) -> BenchCase:
    # `steps` tokens, half of them before position n and half after: n ends a chunk, whose closing is timed with them.
    shape, options, name = {"B": batch, "steps": steps}, {"model": model, "piece": piece}, f"{model}, B={batch}"
    return BenchCase(name, n, dtype, shape, check_length, options, goals, {FORWARD: float(batch * steps)}, "token")


def inputs(case: BenchCase, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Tokens, and weights of order one, so that every part of the model shows in the logits."""
    config = ModelConfig.named(case.options["model"])
    spread, centre = {"gamma": 1.0, "beta": 0.5, "bias": 0.1, "g": 0.1}, {"g": 1.0}

    def draw(name: str, shape: torch.Size) -> Tensor:
        kind = name.rpartition(".")[-1]
        std = spread.get(kind, shape[-1] ** -0.5)
        return centre.get(kind, 0.0) + std * torch.randn(shape, generator=generator)

    parameters = CausalLM(config, device="meta").named_parameters()
    size = (case.shape["B"], length + case.shape["steps"] // 2)
    tokens = torch.randint(config.vocab_size, size, generator=generator)
    return {"tokens": tokens} | {name: draw(name, p.shape) for name, p in parameters}


def _model(case: BenchCase, tensors: dict[str, Tensor]) -> CausalLM:
    model = CausalLM(ModelConfig.named(case.options["model"]), device="meta")
    model.load_state_dict({name: t for name, t in tensors.items() if name != "tokens"}, assign=True)
    return model


_PREFIXES: dict[tuple[str, bytes], ModelState] = {}


def _read(case: BenchCase, model: CausalLM, context: Tensor, backend: str) -> ModelState:
    """The state after the context, which is read in pieces, once for all who start from it."""
    found = backend, context.numpy(force=True).tobytes() + case.name.encode()
    if found not in _PREFIXES:
        state = None
        with torch.no_grad(), flashgau.use_backend(backend):
            for piece in context.split(case.options["piece"], dim=1):
                _, state = model.stack(piece, state=state, return_state=True)
        assert state is not None
        _PREFIXES[found] = state
    return _PREFIXES[found]


def stepping(backend: str, *, inplace: bool, compiled: bool = False) -> Build:
    """The context is read once; then token follows token.

    In place every call writes a copy of that state; making it is timed with it.
    """

    def build(case: BenchCase, tensors: dict[str, Tensor]) -> Problem:
        model = _model(case, tensors)
        context, new = _split(case, tensors["tokens"])
        prefix = _read(case, model, context, backend)
        step = model.eval().compile_step() if compiled else model

        def call() -> Tensor:
            state, logits = prefix.clone() if inplace else prefix, []
            with torch.no_grad(), flashgau.use_backend(backend):
                for token in new.split(1, dim=1):
                    out, state = step(token, state=state, return_state=True, inplace=inplace)
                    logits.append(out)
            return torch.cat(logits, dim=1)

        return Problem(call, {})

    return build


def parallel(case: BenchCase, tensors: dict[str, Tensor]) -> Problem:
    """All tokens at once, by the naive reference."""
    model, tokens = _model(case, tensors), tensors["tokens"]

    def call() -> Tensor:
        with torch.no_grad(), flashgau.use_backend("reference"):
            logits: Tensor = model(tokens)[:, -case.shape["steps"] :]
        return logits

    return Problem(call, {})


def cached(case: BenchCase, tensors: dict[str, Tensor]) -> Problem:
    """Transformer++ of that size over a full cache, whose contents do not matter to the time."""
    config, embedding = ModelConfig.named(case.options["model"]), tensors["stack.embedding.weight"]
    factory: dict[str, Any] = {"device": embedding.device, "dtype": embedding.dtype}
    dim, narrow, head_dim = config.dim, config.key_dim, config.dim // config.heads
    layers = [transformer.Layer(dim, 2 * dim, narrow, head_dim, **factory) for _ in range(config.depth // 2)]
    if not embedding.is_cuda:  # in the order that is read fastest for few rows, as FLASH layers keep theirs
        for p in (p for layer in layers for p in layer.parameters() if p.ndim == 2):
            p.data = p.data.T.contiguous().T
    tokens = tensors["tokens"]
    context, new = _split(case, tokens)
    caches = [torch.randn(2, len(tokens), config.heads, tokens.shape[1], head_dim, **factory) for _ in layers]

    def call() -> Tensor:
        logits = []
        # On a GPU the cuDNN kernel would make a new plan for every length.
        with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION) if embedding.is_cuda else nullcontext():
            for position, token in enumerate(new.split(1, dim=1), context.shape[1]):
                x = embedding[token]
                at = transformer.angles(torch.arange(position, position + 1, device=x.device), head_dim)
                for layer, cache in zip(layers, caches, strict=True):
                    x = layer.step(x, cache, position, at)
                logits.append(x @ embedding.T)
        return torch.cat(logits, dim=1)

    return Problem(call, {})


def remembering(kind: str) -> Build:
    """Our model of that kind, over a state as long as the context, whose contents do not matter to the time."""

    def build(case: BenchCase, tensors: dict[str, Tensor]) -> Problem:
        context, new = _split(case, tensors["tokens"])
        model = CausalLM(_of_kind(case, kind), device=context.device).eval()
        with torch.no_grad():
            _, short = model(context[:, :1], return_state=True)
        state = ModelState([_stretched(layer, context.shape[1]) for layer in short.layers], short.position)
        state.position.fill_(context.shape[1])
        state.reserve(context.shape[1] + 2 * new.shape[1])

        def call() -> Tensor:
            logits = []
            with torch.no_grad():
                for token in new.split(1, dim=1):
                    logits.append(model(token, state=state, return_state=True, inplace=True)[0])
                if kind not in CONSTANT_STATE:
                    state.truncate(new.shape[1])
            return torch.cat(logits, dim=1)

        return Problem(call, {})

    return build


def _of_kind(case: BenchCase, kind: str) -> ModelConfig:
    return ModelConfig.named(f"{kind}-{case.options['model'].rpartition('-')[-1]}")


def _stretched(layer: Any, n: int) -> Any:
    """A layer's state as long as if it had seen n tokens."""
    memory = getattr(layer, "memory", layer)
    if isinstance(memory, KeyValueCache):
        sizes = [(*x.shape[:2], n, x.shape[3]) for x in (memory.keys, memory.values)]
        memory = KeyValueCache(*(torch.randn(size, device=memory.keys.device) for size in sizes))
    else:
        memory.position.fill_(n)
    return UnitState(memory) if isinstance(layer, UnitState) else memory


def remembered(config: ModelConfig, tokens: int) -> int:
    """Bytes of the state of one sequence after so many tokens: counted after one and two chunks, in fp32."""
    model, counts = CausalLM(config), []
    for n in (config.chunk_size, 2 * config.chunk_size):
        with torch.no_grad():
            _, state = model(torch.zeros(1, n, dtype=torch.int64), return_state=True)
        memories = [getattr(layer, "memory", layer) for layer in state.layers]
        tensors = [(m.keys, m.values) if isinstance(m, KeyValueCache) else m.tensors() for m in memories]
        counts.append(sum(t.numel() * t.element_size() for held in tensors for t in held))
    return counts[0] + (counts[1] - counts[0]) * (tokens - config.chunk_size) // config.chunk_size


# Providers of the plot: what each is called there, and the kind whose state it keeps.
PLOTTED = {
    "flashgau-eager": ("FLASH", "flash"),
    "flashgau-eager-compiled": ("FLASH, compiled", "flash"),
    "flashgau-triton": ("FLASH, Triton", "flash"),
    "mc-tfm++": ("MC-TFM++", "mc-tfm++"),
    "flash-quad": ("GAU", "flash-quad"),
    "transformer++": ("Transformer++, plain PyTorch", "transformer++"),
    "our-transformer++": ("Transformer++", "transformer++"),
}


def plot(record: dict[str, Any], path: Path) -> bool:
    """Tokens per second, and bytes that are remembered, against the context, of all kinds; one sequence.

    Whether anything was measured, and drawn.
    """
    entries = sorted((e for e in record["cases"] if e["shape"]["B"] == 1), key=lambda e: e["length"])
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    lengths = [e["length"] for e in entries]
    for place, (who, (label, kind)) in enumerate(PLOTTED.items()):
        times = [(e.get("providers", {}).get(who) or {}).get("times", {}).get(FORWARD) for e in entries]
        points = [(e["length"], e["work"][FORWARD] / t["median_s"]) for e, t in zip(entries, times, strict=True) if t]
        if not points:
            continue
        style: dict[str, Any] = {"marker": "osD^vPX"[place], "markersize": 4, "linewidth": 1.4, "label": label}
        line = speed.plot(*zip(*points, strict=True), **style)[0]
        if who in ("our-transformer++", "flashgau-eager-compiled"):
            continue  # which remembers as much as another
        config = ModelConfig.named(f"{kind}-{entries[0]['options']['model'].rpartition('-')[-1]}")
        counted = [remembered(config, n) / 2**20 for n, _ in points]
        memory.plot([n for n, _ in points], counted, color=line.get_color(), **style)
    for axis, label in ((speed, "tokens per second"), (memory, "state of one sequence (MiB)")):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(lengths, [report.count(n) for n in lengths])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(record["x_label"])
        axis.set_ylabel(label)
        axis.grid(True, which="major", linewidth=0.4, alpha=0.6)
    machine = record["machine"]
    model = entries[0]["options"]["model"] if entries else ""
    title = f"{record['title']}: {model} and others of its size, {machine['cpu']}, {machine['date'][:10]}"
    figure.suptitle(title, fontsize=10)
    figure.legend(*speed.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    if speed.lines:
        figure.savefig(path, dpi=130)
    return bool(speed.lines)


def _split(case: BenchCase, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The context, and the tokens whose time is taken."""
    start = tokens.shape[1] - case.shape["steps"]
    return tokens[:, :start], tokens[:, start:]


def _short(case: BenchCase, device: str) -> str | None:
    """GAU's keys and values are 2e + S numbers a token and layer: 340 MiB of 16k tokens in flash-quad-small."""
    return "its cache would take gigabytes" if case.length * case.shape["B"] > 2**14 else None


def _tiny(case: BenchCase, device: str) -> str | None:
    """A minute of compiling is no quick look whether it works."""
    return "not compiled for a quick look" if case.options["model"].endswith("tiny") else None


OPERATION = Operation(
    name="decode",
    title="Decoding after a context",
    cases=cases,
    inputs=inputs,
    oracle=parallel,
    plain=parallel,
    providers=(
        Provider("flashgau-eager", stepping("eager", inplace=True)),
        Provider("flashgau-eager-compiled", stepping("eager", inplace=True, compiled=True), _tiny, devices=("cpu",)),
        Provider("flashgau-eager-functional", stepping("eager", inplace=False)),
        Provider("flashgau-triton", stepping("triton", inplace=True), devices=("cuda",)),
        Provider("transformer++", cached, other="Transformer++ of as many parameters, its key/value cache on SDPA"),
        Provider("our-transformer++", remembering("transformer++"), other="our model of that kind"),
        Provider("mc-tfm++", remembering("mc-tfm++"), other="our model of that kind"),
        Provider("flash-quad", remembering("flash-quad"), _short, other="our model of that kind"),
    ),
    x_label="context (tokens)",
    together=True,
    plot=plot,
)
