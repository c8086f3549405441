"""The whole comparison: tunes every method by the same trials, then runs the cells that are not done yet."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from sseds_rec.compare.cells import Cell, Rates, grid_of_rates
from sseds_rec.compare.contestants import CONTESTANTS, Variant
from sseds_rec.compare.pool import Pool
from sseds_rec.compare.run_cell import RESULT, is_above, remove_starts, run_cell
from sseds_rec.config import Config
from sseds_rec.files import read_json
from sseds_rec.models import MODELS

Role = Literal["trial", "result", "ablation"]

#: Between two times that results are written.
_SAVE_SECONDS = 60.0

#: Told of every phase: its name, its cells, and how many of them are done.
Report = Callable[[str, int, int], None]


@dataclass
class Grid:
    """The cells of a comparison, phase by phase: those of later phases depend on what the earlier ones find.

    Args:
        config: its `compare` section says what is compared.
        folder: of the comparison.

    Attributes:
        roles: cell -> what it is for; a trial may be a result as well, which is then run once.
        chosen: (model, method, variant) -> the rates with the best validation AUC.
    """

    config: Config
    folder: Path
    roles: list[tuple[Cell, Role]] = field(default_factory=list)
    chosen: dict[tuple[str, str, Variant], Rates] = field(default_factory=dict)

    def __post_init__(self) -> None:
        section = self.config.compare
        self.seeds = [self.config.seed + number for number in range(section.seeds)]
        self.tried = grid_of_rates(section)
        self.begun: set[Cell] = set()  # by this call

    def entries(self, model: str) -> list[tuple[str, Variant]]:
        """What is tuned and run of a model besides `full`: methods, then ablations of what there is."""
        section = self.config.compare
        methods = [name for name in section.names if name != "full"]
        found: list[tuple[str, Variant]] = [(name, "") for name in methods]
        for name in methods if section.ablations else []:
            own = CONTESTANTS[name].ablations
            found += [(name, variant) for variant in own if self._differs(model, variant)]
        return found

    def _differs(self, model: str, variant: Variant) -> bool:
        if "_transform" in variant:
            return MODELS[model].aligns
        return variant != "without_rescaling" or self.config.search.rescale_batches > 0

    def run(self, pool: Pool, report: Report, save: Callable[[], None]) -> None:
        """Runs every cell that has no result yet, and those that failed once more.

        Args:
            pool: runs them.
            report: is told how far it is.
            save: writes down what there is; called every minute or so.
        """
        section = self.config.compare
        self._report, self._save = report, save
        bases = [Cell(model, "full", None, self.seeds[0], rates) for model in section.models for rates in self.tried]
        self._run("tuning the full model", bases, "trial", pool)
        for model in section.models:
            self._choose(model, "full", "", [cell for cell in bases if cell.model == model])

        trials = {
            (model, method, variant): [self._cell(model, method, variant, self.seeds[0], rates) for rates in self.tried]
            for model in section.models
            for method, variant in self.entries(model)
            if not variant.endswith("without_retraining")
        }
        self._run("tuning the methods", [cell for cells in trials.values() for cell in cells], "trial", pool)
        for (model, method, variant), cells in trials.items():
            self._choose(model, method, variant, cells)
        for model in section.models:
            for method, variant in self.entries(model):  # those that train nothing have nothing to tune
                self.chosen.setdefault((model, method, variant), self.tried[0])

        full = [
            Cell(model, "full", None, seed, self.chosen[model, "full", ""])
            for model in section.models
            for seed in self.seeds
        ]
        self._run("full models of all seeds", full, "result", pool)
        first = [
            self._cell(model, method, variant, seed, self.chosen[model, method, variant])
            for model in section.models
            for seed in self.seeds
            for method, variant in self.entries(model)
        ]
        self._run(f"budget {section.tuned_at:g}", [cell for cell in first if not cell.variant], "result", pool)
        self._run("ablations", [cell for cell in first if cell.variant], "ablation", pool)
        rest = [
            replace(cell, budget=budget)
            for budget in section.budgets
            for cell in first
            if cell.budget not in (None, budget) and not cell.variant
        ]
        self._run("other budgets", rest, "result", pool)

    def _cell(self, model: str, method: str, variant: Variant, seed: int, rates: Rates) -> Cell:
        """A cell at the budget of the trials."""
        contestant = CONTESTANTS[method]
        budget = self.config.compare.tuned_at if contestant.budgeted else None
        base = self.chosen[model, "full", ""] if contestant.pretrained else None
        return Cell(model, method, budget, seed, rates, base, variant)

    def _choose(self, model: str, method: str, variant: Variant, trials: Sequence[Cell]) -> None:
        """The rates with the best validation AUC; of trials within their budget, if there are any. The others' weights go."""
        found = {cell.rates: self.result(cell) for cell in trials}

        def worth(rates: Rates) -> tuple[bool, float]:
            trial = found[rates]
            return "auc" in trial and not is_above(trial), trial.get("validation_auc", -math.inf)

        self.chosen[model, method, variant] = best = max(found, key=worth)
        for cell in trials:
            if cell.rates != best and "error" not in found[cell.rates]:
                remove_starts(self.folder / cell.folder)

    def _run(self, phase: str, cells: Iterable[Cell], role: Role, pool: Pool) -> None:
        cells, report, saved = list(cells), self._report, time.monotonic()
        self.roles += [(cell, role) for cell in cells]
        todo = [cell for cell in cells if self._is_due(cell)]
        self.begun.update(todo)
        report(phase, len(cells) - len(todo), len(cells))
        todo.sort(key=lambda cell: not cell.contestant.learns)  # the longest first
        calls = [(cell, self.config, self.folder, self._leader(cell)) for cell in todo]
        for number, _ in enumerate(pool.run(run_cell, calls), start=len(cells) - len(todo) + 1):
            report(phase, number, len(cells))
            if time.monotonic() - saved > _SAVE_SECONDS:
                self._save()
                saved = time.monotonic()

    def _is_due(self, cell: Cell) -> bool:
        """Whether a cell has not run, or failed in an earlier call: what was in its way may be gone."""
        path = self.folder / cell.folder / RESULT
        return not path.exists() or ("error" in read_json(path) and cell not in self.begun)

    def _leader(self, cell: Cell) -> Cell | None:
        leader = cell.leader(self.config.compare.tuned_at)
        return leader if cell.contestant.learns and leader != cell else None

    def result(self, cell: Cell) -> dict[str, Any]:
        """What a cell left; without "auc" if it failed."""
        found: dict[str, Any] = read_json(self.folder / cell.folder / RESULT)
        return found
