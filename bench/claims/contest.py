"""A contest: models trained with equal budgets, each after the same search for a learning rate, over paired seeds.

Three stages, of which each follows from the results before it: the pace of every contestant, a short run for every
learning rate, and a run for every seed. Contestants of one seed see the same windows in the same order, and begin with
the same weights where their shapes are the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from bench.claims import Results, Settings, Trial
from bench.claims.statistics import Interval, interval
from bench.claims.train import CHECKPOINT_SECONDS, VALIDATIONS
from bench.claims.variants import Spec

SEARCH_SHARE = 0.25  # of the steps of a run, for each learning rate that is tried
SEARCH_SEED = 1000  # of the search alone
VALIDATED = 8  # steps' bytes in a validation
FEWEST = 20  # steps of a contest of equal tokens, however short the time; one of equal compute has at least 2
FIXED_SECONDS = 1.5  # of a trial, besides reading the text: model, checkpoint, curve
PACE = "pace"

METHOD = (
    "Every contestant tries the same learning rates ({lrs}), each in a run of {share:.0%} of the steps with a seed "
    "of its "
    "own, and takes the one with the lowest held-out loss; AdamW (0.9, 0.95), weight decay 0.1, warm-up and cosine as "
    "`flashgau train` has them. Contestants of one seed see the same windows in the same order and begin with the same "
    "weights where shapes are equal. Held-out loss: of the same windows of other files for all, at the end of the run. "
    "Intervals: Student's t, 95%, over seeds, of the relative difference of the pairs; not corrected for their number, "
    "and given these held-out windows. "
)


@dataclass(frozen=True)
class Contest:
    """What competes.

    Attributes:
        models: by name, each with its own "batch" and "length" beside what `variants.build` takes.
        lrs: learning rates to try; a single one is taken without a search.
        equal: "tokens": all take as many steps; "compute": all train for as many seconds.
        share: of the claim's budget.
    """

    models: dict[str, Spec]
    lrs: tuple[float, ...]
    equal: str = "tokens"
    share: float = 1.0
    quick_steps: int = field(default=3)

    def method(self) -> str:
        """For the record."""
        lrs = ", ".join(f"{lr:g}" for lr in self.lrs)
        what = "as many tokens" if self.equal == "tokens" else "for as long, by the pace of its steps"
        return METHOD.format(lrs=lrs, share=SEARCH_SHARE) + f"Every contestant is trained {what}."

    def trials(self, settings: Settings, results: Results) -> list[Trial]:
        """Those that follow from the results so far."""
        rounds = {"rounds": 5, "seconds": 0.05 * 60 * settings.minutes * self.share, "models": self.models}
        found = [Trial(PACE, "pace", rounds)]
        if PACE not in results:
            return found
        steps = self.steps(settings, results)
        searching = self._searching(settings)
        for name in self.models if len(searching) > 1 else ():
            few = max(2, math.ceil(SEARCH_SHARE * steps[name]))
            found += [self._train(results, f"search/{name}/lr={lr:g}", name, few, lr, SEARCH_SEED) for lr in searching]
        if any(trial.key not in results for trial in found):
            return found
        for seed in range(settings.seeds):
            for name in self.models:
                lr = self.best_lr(settings, results, name)
                found.append(self._train(results, f"seed {seed}/{name}", name, steps[name], lr, seed))
        return found

    def _searching(self, settings: Settings) -> tuple[float, ...]:
        return self.lrs[:1] if settings.quick else self.lrs

    def _train(self, results: Results, key: str, name: str, steps: int, lr: float, seed: int) -> Trial:
        save = max(1, math.ceil(CHECKPOINT_SECONDS / results[PACE]["seconds"][name]))
        budget = {"steps": steps, "lr": lr, "seed": seed, "windows": VALIDATED * self.models[name]["batch"],
                  "save_every": save}  # fmt: skip
        return Trial(key, "train", {**self.models[name], **budget})

    def steps(self, settings: Settings, results: Results) -> dict[str, int]:
        """Of a full run of each contestant, so that all runs together take the budget."""
        if settings.quick:
            return dict.fromkeys(self.models, self.quick_steps)
        seconds, searched = results[PACE]["seconds"], len(self._searching(settings))
        searched = searched if searched > 1 else 0
        runs = searched + settings.seeds
        full = searched * SEARCH_SHARE + settings.seeds  # runs, in full ones
        checks = (VALIDATIONS + 1) * VALIDATED / 3  # of a run, in steps: a forward is a third of one
        fixed = FIXED_SECONDS + results[PACE]["reading"]
        left = 0.9 * 60 * settings.minutes * self.share - len(self.models) * runs * fixed
        left -= sum(seconds.values()) * runs * checks
        if self.equal == "tokens":
            return dict.fromkeys(self.models, max(FEWEST, int(left / (full * sum(seconds.values())))))
        each = left / (full * len(self.models))
        return {name: max(2, int(each / seconds[name])) for name in self.models}

    def best_lr(self, settings: Settings, results: Results, name: str) -> float:
        """The learning rate whose short run ended lowest; one that diverged never is, unless all did."""
        searching = self._searching(settings)
        found = [results.get(f"search/{name}/lr={lr:g}", {}).get("loss") for lr in searching]
        losses = [math.inf if loss is None else loss for loss in found]
        return searching[losses.index(min(losses))]

    def losses(self, settings: Settings, results: Results) -> dict[str, list[float]]:
        """Of every contestant, by seed: of the seeds that all have finished, without one that diverged."""
        rows = [{name: results.get(f"seed {seed}/{name}", {}).get("loss") for name in self.models}
                for seed in range(settings.seeds)]  # fmt: skip
        whole: list[Any] = [row for row in rows if all(loss is not None for loss in row.values())]
        return {name: [float(row[name]) for row in whole] for name in self.models} if whole else {}

    def intervals(self, settings: Settings, results: Results) -> dict[str, Interval]:
        """Of the losses."""
        return {name: interval(losses) for name, losses in self.losses(settings, results).items()}


def curves(settings: Settings, results: Results, name: str) -> list[list[Any]]:
    """The held-out losses of a contestant along its runs: one list of (step, loss) for each seed."""
    return [results[key]["curve"] for seed in range(settings.seeds) if (key := f"seed {seed}/{name}") in results]
