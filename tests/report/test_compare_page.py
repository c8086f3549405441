"""The comparison's page says what its tables say, finished or not, or names the file that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from playwright.sync_api import Browser

from sseds_rec.errors import UserError
from sseds_rec.report.compare import write_compare_report
from tests.report.grids import GAINS, rewrite, write_grid
from tests.report.test_report_browser import COLORS, CUT_OFF, FIGURE_SIZES, contrast
from tests.report.test_report_page import Page, edit, value

FIELDS = {"ad": 3000, "user": 900, "hour": 24}
FEW = ("full", "uniform", "pep", "sseds_paper", "sseds")
FILES = ("results.parquet", "widths.parquet", "saliency.parquet", "compare.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    """Two models, five methods, two budgets and three seeds, with a missed budget and two cells to go, and its page."""
    missing = [{"model": "deepfm", "method": "mde", "variant": "", "budget": 0.1, "seed": 2}, "fm autodim 5 %"]
    folder = write_grid(
        tmp_path_factory.mktemp("page") / "grid", ("fm", "deepfm"), FEW, (0.5, 0.1), fields=FIELDS, missing=missing
    )
    odd = (pl.col("method") == "pep") & (pl.col("seed") == 1) & (pl.col("budget") == 0.5) & (pl.col("role") == "result")
    odd &= pl.col("model") == "fm"
    over = pl.when(odd).then(pl.col("budget_parameters") + 1234).otherwise(pl.col("embedding_parameters"))
    rewrite(folder, lambda frame: frame.with_columns(missed=odd, embedding_parameters=over))
    return folder, Page(write_compare_report(folder))


def table(page: Page, *columns: str) -> list[dict[str, str]]:
    """Rows of the first table that has all of these columns, by column."""
    return tables(page, *columns)[0]


def tables(page: Page, *columns: str) -> list[list[dict[str, str]]]:
    return [
        [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
        for rows in page.tables
        if rows and set(columns) <= set(rows[0])
    ]


def of(frame: pl.DataFrame, **cell: object) -> pl.DataFrame:
    """The rows of a cell."""
    return frame.filter(*(pl.col(k).is_null() if v is None else pl.col(k) == v for k, v in cell.items()))


def results(folder: Path) -> pl.DataFrame:
    return of(pl.read_parquet(folder / "results.parquet"), role="result")


def shown(budget: float | None) -> str:
    return "–" if budget is None else f"{100 * budget:g}\N{NO-BREAK SPACE}%"


def mean_and_spread(cell: str) -> list[float]:
    return [value(part) for part in cell.split(" ± ")]


def test_every_result_is_in_the_table(finished: tuple[Path, Page]) -> None:
    folder, page = finished
    rows = {(row["Model"], row["Method"], row["Budget"]): row for row in table(page, "Test AUC", "Seeds")}
    cells = results(folder).partition_by("model", "method", "budget", as_dict=True)
    assert rows.keys() == {(model, method, shown(budget)) for model, method, budget in cells}
    for (model, method, budget), cell in cells.items():
        row = rows[model, method, shown(budget)]
        for title, column in (("Test AUC", "auc"), ("Test logloss", "logloss")):
            numbers = cell[column].to_numpy()
            assert mean_and_spread(row[title]) == pytest.approx(
                [np.mean(numbers), np.std(numbers, ddof=1)], abs=5.001e-5
            )
        for title, column in (("Embedding parameters", "embedding_parameters"), ("Stored", "stored_parameters")):
            assert value(row[title]) == pytest.approx(np.mean(cell[column].to_numpy()), abs=0.51)
        whole = of(results(folder), model=model, method="full")["embedding_parameters"].to_numpy()
        share = 100 * np.mean(cell["embedding_parameters"].to_numpy()) / np.mean(whole)
        assert value(row["Of the full"]) == pytest.approx(share, rel=1e-3)
        assert (row["Seeds"], row["Missed"]) == ("3", "1 of 3" if (model, method, budget) == ("fm", "pep", 0.5) else "")


def test_ranking_is_paired_within_model_and_seed(finished: tuple[Path, Page]) -> None:
    folder, page = finished
    for budget, rows in zip((0.5, 0.1), tables(page, "Mean rank", "Verdict"), strict=True):
        auc = {
            method: of(results(folder), method=method, budget=None if method == "full" else budget)
            .sort("model", "seed")["auc"]
            .to_numpy()
            for method in FEW
            if (method, budget) != ("pep", 0.5)  # which missed it
        }
        assert [row["Method"] for row in rows] == sorted(auc, key=lambda method: -auc[method].mean())
        for row in rows:
            own, best = auc[row["Method"]], max((auc[m] for m in auc if m != "full"), key=np.mean)
            assert value(row["Mean AUC"]) == pytest.approx(own.mean(), abs=5.001e-5)
            if row["Verdict"] != "best":
                assert value(row["Less the best"]) == pytest.approx((own - best).mean(), abs=5.001e-5)
            if row["Method"] != "sseds":
                assert value(row["Less sseds"]) == pytest.approx((own - auc["sseds"]).mean(), abs=5.001e-5)
    assert "n = 6: the (model, seed) pairs" in page.text
    assert page.text.count("sseds has the best mean test AUC at all 2 budgets, told apart from all others at") == 1


def test_seconds_and_their_ratio_to_those_of_sseds(finished: tuple[Path, Page]) -> None:
    folder, page = finished
    rows = {(row["Model"], row["Method"]): row for row in table(page, "Search / sseds")}
    assert len(rows) == 2 * len(FEW)
    for (model, method), row in rows.items():
        cell, own = (of(results(folder), model=model, method=m, budget=0.1) for m in (method, "sseds"))
        if method == "full":
            cell = of(results(folder), model=model, method="full")
        for title, column in (("Pretrain s", "pretrain_seconds"), ("Retrain s", "retrain_seconds")):
            assert value(row[title]) == pytest.approx(np.mean(cell[column].to_numpy()), abs=0.051)
        searched, of_sseds = (float(np.mean(f["search_seconds"].to_numpy())) for f in (cell, own))
        assert value(row["Search s"]) == pytest.approx(searched, abs=0.0051)
        ratio = row["Search / sseds"]
        assert ratio == "–" if searched == 0 else value(ratio[1:]) == pytest.approx(searched / of_sseds, rel=5e-3)


def test_element_wise_methods_are_held_against_slim_bytes(finished: tuple[Path, Page]) -> None:
    folder, page = finished
    rows = table(page, "Nonzeros")
    assert [(row["Model"], row["Method"], row["Budget"]) for row in rows] == [
        (model, "pep", shown(budget)) for model in ("fm", "deepfm") for budget in (0.5, 0.1)
    ]
    frame = of(results(folder), model="deepfm", budget=0.1)
    pruned, slim = of(frame, method="pep"), frame.filter(pl.col("method") != "pep")["dense_bytes"].to_numpy()
    numbers = [value(rows[-1][title]) for title in ("Nonzeros", "Dense bytes", "CSR bytes", "Slim models' bytes")]
    columns = ("embedding_parameters", "dense_bytes", "csr_bytes")
    assert numbers == pytest.approx([*(np.mean(pruned[c].to_numpy()) for c in columns), np.mean(slim)], abs=0.51)
    assert value(rows[-1]["CSR / slim"][1:]) == pytest.approx(numbers[2] / numbers[3], rel=5e-3)


def test_ablation_sorts_steps_and_starts(finished: tuple[Path, Page]) -> None:
    folder, page = finished
    every = pl.read_parquet(folder / "results.parquet").filter(pl.col("role") != "trial")

    def mean(variant: str, column: str = "auc", method: str = "sseds") -> float:
        return float(np.mean(of(every, model="fm", method=method, variant=variant, budget=0.1)[column].to_numpy()))

    early = "auc_before_retraining"
    expected = {
        ("sseds", "without retraining"): (mean("", early), mean("random_transform_without_retraining")),
        ("sseds", "without ticket"): (mean("without_ticket"), mean("random_transform_without_ticket")),
        ("sseds", "without rescaling"): (mean("without_rescaling"), None),
        ("sseds", "in full"): (mean(""), mean("random_transform")),
        ("sseds_paper", "without retraining"): (
            mean("select_transform", early, "sseds_paper"),
            mean("without_retraining", method="sseds_paper"),
        ),
        ("sseds_paper", "without ticket"): (
            mean("select_transform_without_ticket", method="sseds_paper"),
            mean("without_ticket", method="sseds_paper"),
        ),
        ("sseds_paper", "in full"): (mean("select_transform", method="sseds_paper"), mean("", method="sseds_paper")),
    }
    base, *rows = table(page, "fm, select", "deepfm, random")
    assert (base["Method"], base["Budget"]) == ("full", "–") and base["fm, select"] == base["fm, random"]
    assert {(row["Method"], row["Test AUC"]) for row in rows} == expected.keys()
    for row in rows:
        for column, number in zip(("fm, select", "fm, random"), expected[row["Method"], row["Test AUC"]], strict=True):
            if number is None:
                assert row[column] == "–"
            else:
                assert mean_and_spread(row[column])[0] == pytest.approx(number, abs=5.001e-5)


def test_trials_and_their_number(finished: tuple[Path, Page]) -> None:
    _, page = finished
    rows = table(page, "Trials")
    assert {(row["Model"], row["Learning rate"], row["L2"]) for row in rows} == {
        ("fm", "0.001", "0.0001"),
        ("deepfm", "0.001", "1e-05"),
    }
    for row in rows:
        chosen = 0.77 - float(row["Learning rate"]) - float(row["L2"])
        assert value(row["Validation AUC of the trial"]) == pytest.approx(chosen, abs=5.001e-5)
    assert {row["Trials"] for row in rows} == {"4"} and "Every method had 4 trials for each model." in page.text


def test_dims_are_means_over_seeds(finished: tuple[Path, Page]) -> None:
    folder, page = finished
    widths = of(pl.read_parquet(folder / "widths.parquet"), model="fm", budget=0.1)
    rows = table(page, "Dim before")
    assert [row["Field"] for row in rows] == ["ad", "user", "hour"]  # the largest first
    for row in rows:
        for method in ("uniform", "sseds_paper", "sseds"):
            mean = np.mean(of(widths, field=row["Field"], method=method)["dim"].to_numpy())
            assert value(row[method]) == pytest.approx(mean, rel=5e-3)


def test_what_missed_its_budget_and_what_is_not_finished_is_named(finished: tuple[Path, Page]) -> None:
    folder, page = finished
    (row,) = table(page, "Asked")
    asked = of(results(folder), model="fm", method="pep", budget=0.5, seed=1)["budget_parameters"].item()
    assert list(row.values()) == ["fm", "pep", shown(0.5), "1", f"{asked + 1234:,}", f"{asked:,}"]
    assert "1 model missed the budget" in page.text and "2 cells are not finished" in page.text
    assert "model deepfm, method mde, budget 0.1, seed 2" in page.text and "fm autodim 5 %" in page.text


def test_ids_are_unique_and_the_page_refers_to_nothing_else(finished: tuple[Path, Page]) -> None:
    _, page = finished
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [a[key] or "" for _, a in page.tags for key in ("href", "xlink:href", "src") if key in a]
    assert all(link.startswith(("data:", "#")) for link in links)
    referred = {a.get("aria-labelledby") for _, a in page.tags} | {link[1:] for link in links if link.startswith("#")}
    assert referred - {None} <= set(ids)
    labels = [a["aria-label"] or "" for _, a in page.tags if a.get("role") == "img"]
    assert len(labels) == 2 * 5 and all(len(label) > 40 for label in labels)


def test_a_second_page_is_the_same(folder: Path) -> None:
    first = write_compare_report(folder).read_text()
    assert write_compare_report(folder).read_text() == first
    assert [path.name for path in (folder / "report").iterdir()] == ["compare.html"]


def only(**cell: object) -> Callable[[pl.DataFrame], pl.DataFrame]:
    return lambda frame: of(frame, **cell)


def test_one_seed_one_model_one_budget(tmp_path: Path) -> None:
    folder = write_grid(tmp_path / "g", ("fm",), FEW, (0.2,), (7,), FIELDS)
    page = Page(write_compare_report(folder))
    assert (
        "n = 1" in page.text and "it tells nothing apart" in page.text and "not told apart from all others" in page.text
    )
    assert "±" not in "".join(cell for rows in page.tables for row in rows for cell in row)
    assert "nan" not in page.text.lower()
    auc = of(results(folder), method="sseds")["auc"].item()
    assert f"{auc:.4f}" in {row["Test AUC"] for row in table(page, "Seeds")}
    assert "one standard deviation over the seeds" not in page.text


@pytest.mark.parametrize("edits", ["trials", "references", "alone", "no sseds", "no numbers"])
def test_a_grid_that_has_just_begun(tmp_path: Path, edits: str) -> None:
    folder = write_grid(tmp_path / "g", ("fm",), FEW, (0.2,), (7,), FIELDS)
    change, headline = {
        "trials": (only(role="trial"), "No model is trained yet"),
        "references": (only(method="full"), "No budget has a result yet"),
        "alone": (only(method="pep"), "pep can be compared with no other method yet"),
        "no sseds": (
            lambda frame: frame.filter(~pl.col("method").str.starts_with("sseds")),
            "pep has the best mean test",
        ),
        "no numbers": (lambda frame: frame.with_columns(auc=pl.lit(None, pl.Float64)), "No budget has a result yet"),
    }[edits]
    rewrite(folder, change)
    for name in ("widths.parquet", "saliency.parquet"):
        rewrite(folder, lambda frame: frame.clear(), name)
    edit(folder / "compare.json", lambda about: about.update(seconds=None))
    page = Page(write_compare_report(folder))
    assert headline in page.text and "It took" not in page.text


def test_a_method_with_too_few_cells_is_not_ranked(tmp_path: Path) -> None:
    folder = write_grid(tmp_path / "g", ("fm",), ("uniform", "mde", "sseds"), (0.1,), (0, 1, 2), FIELDS)
    rewrite(folder, lambda frame: frame.filter((pl.col("method") != "mde") | (pl.col("seed") == 0)))
    page = Page(write_compare_report(folder))
    assert [row["Method"] for row in table(page, "Verdict")] == ["sseds", "uniform"]
    assert "since they missed the budget or have too few cells: mde (1)" in page.text


def test_the_words_claim_no_more_than_the_test(tmp_path: Path) -> None:
    """uniform is ahead of sseds by less than the noise at a half, and behind it by far at a tenth."""
    folder = write_grid(tmp_path / "g", ("fm",), ("uniform", "random", "sseds"), (0.5, 0.1), fields=FIELDS)
    auc = {("uniform", 0.5): [0.781, 0.785, 0.780], ("uniform", 0.1): [0.700, 0.701, 0.702]}
    auc |= {("sseds", 0.5): [0.782, 0.781, 0.779], ("sseds", 0.1): [0.800, 0.802, 0.801]}
    auc |= {("random", 0.5): [0.601, 0.600, 0.602], ("random", 0.1): [0.600, 0.602, 0.601]}
    new = [{"method": m, "budget": b, "seed": i, "new": x} for (m, b), own in auc.items() for i, x in enumerate(own)]

    def change(frame: pl.DataFrame) -> pl.DataFrame:
        frame = frame.join(pl.DataFrame(new), ["method", "budget", "seed"], how="left")
        return frame.filter(pl.col("role") == "result").with_columns(auc="new").drop("new")

    rewrite(folder, change)
    text = Page(write_compare_report(folder)).text
    half, tenth = shown(0.5), shown(0.1)
    assert f"Best mean test AUC: uniform at {half}; sseds at {tenth}; told apart from all others at 1 of 2" in text
    half_words = "uniform 0.7820 on average; not told apart from the best: sseds; behind it: random; "
    half_words += "sseds less the best is −0.0013"
    assert f"At {half}: {half_words} (95 % interval" in text
    assert f"At {tenth}: sseds 0.8010 on average; behind it: uniform and random. n = 3 pairs." in text


def test_odd_names_are_text_and_nothing_else(tmp_path: Path) -> None:
    names = ['<b>&"', "$x$_{a", "目的地", "</svg><script>x</script>", "tab\tand\nline"]
    folder = write_grid(tmp_path / "<i>&'x", ("fm",), ("uniform", "sseds"), (0.1,), (0,), dict.fromkeys(names, 50))
    rewrite(folder, lambda frame: frame.with_columns(model=pl.lit("<u>&m")))
    for name in ("widths.parquet", "saliency.parquet"):
        rewrite(folder, lambda frame: frame.with_columns(model=pl.lit("<u>&m")), name)
    edit(
        folder / "compare.json",
        lambda about: about.update(command="<s>&", missing=["<q>&"], environment={"<a2>": "<k>"}),
    )
    page = Page(write_compare_report(folder))
    assert {"b", "i", "script", "u", "s", "q", "a2", "k"}.isdisjoint(tag for tag, _ in page.tags)
    assert {row["Field"] for row in table(page, "Dim before")} == {*names[:4], "tab\ufffdand\ufffdline"}
    assert all(text in page.text for text in ("<u>&m", "<s>&", "<q>&", "<a2>", "<k>", "<i>&'x"))


def expect_error(folder: Path, *words: str) -> None:
    with pytest.raises(UserError) as error:
        write_compare_report(folder)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)
    assert not (folder / "report").exists()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_grid(tmp_path / "g", ("fm",), ("full", "sseds"), (0.1,), (0,), FIELDS)


@pytest.mark.parametrize("name", FILES)
def test_missing_and_damaged_files(folder: Path, name: str) -> None:
    path = folder / name
    whole = path.read_bytes()
    for content in (b"", b"[1, \xff{", b"[1, 2]", whole[:-20], whole[: len(whole) // 2]):
        path.write_bytes(content)
        expect_error(folder, str(path))
    path.unlink()
    expect_error(folder, str(path))


def test_tables_that_are_not_as_they_should_be(folder: Path) -> None:
    path = folder / "results.parquet"
    good = path.read_bytes()
    for change, words in (
        (lambda frame: frame.drop("auc"), ("no column 'auc'",)),
        (lambda frame: frame.with_columns(auc=pl.lit("high")), ("'auc'", "String", "Float64")),
        (lambda frame: frame.with_columns(seed=pl.lit(None)), ("'seed'", "empty")),
        (lambda frame: pl.concat([frame, frame.tail(1)]), ("two rows", "sseds", "budget 0.1")),
        (lambda frame: frame.with_columns(budget=pl.lit(10.0)), ("budget 10.0",)),
    ):
        path.write_bytes(good)
        rewrite(folder, change)
        expect_error(folder, str(path), *words)
    path.write_bytes(good)
    edit(folder / "compare.json", lambda about: about["data"].pop("fields"))
    expect_error(folder, "compare.json", "data.fields")
    edit(folder / "compare.json", lambda about: (about["data"].update(fields=3), about.update(tune_budget=0)))
    expect_error(folder, "compare.json", "tune_budget")


@pytest.fixture(scope="module")
def all_methods(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of all methods on one model."""
    folder = tmp_path_factory.mktemp("browser") / "grid"
    return write_compare_report(write_grid(folder, ("wide_deep",), tuple(GAINS), missing=["a" * 200]))


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_page_in_the_browser(browser: Browser, all_methods: Path, width: int, scheme: str) -> None:
    url = all_methods.resolve().as_uri()
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    messages: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(url)
    assert messages == []
    assert [request for request in requests if not request.startswith("data:")] == [url]
    assert page.evaluate("document.documentElement.scrollWidth") == width  # no horizontal overflow
    sizes = page.evaluate(FIGURE_SIZES)
    assert len(sizes) == 5 and min(sizes) > 100
    assert page.evaluate(CUT_OFF) == []
    for selector in ("h1", "figcaption", "figure svg text", ".plan td", ".grid-table .own td", ".sections a"):
        assert contrast(page.evaluate(COLORS, selector)) > 4.5, selector

    page.keyboard.press("Tab")  # the first stop of the keyboard is the list of sections
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#accuracy"
    page.close()
