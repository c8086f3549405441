"""The page says what the artefacts say, for any names and any number of tables, or names the artefact that is wrong."""

import json
import math
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from sseds_rec.errors import UserError
from sseds_rec.report import write_report

MakeRun = Callable[..., Path]


class Page(HTMLParser):
    """The text of every table cell by table and row, all text, and every tag, as a browser would see them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self._in_cell = False
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell &= tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell:
            self.tables[-1][-1][-1] += data


def value(cell: str) -> float:
    return float(cell.replace(",", "").replace("\N{MINUS SIGN}", "-").replace("\N{NO-BREAK SPACE}%", ""))


def edit(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_results_are_those_of_metrics_json(make_run: MakeRun) -> None:
    run = make_run()
    metrics = json.loads((run / "metrics.json").read_text())
    base, slim = metrics["pretrain"], metrics["retrain"]
    rows = {row[0]: [value(cell) for cell in row[1:]] for row in Page(write_report(run)).tables[0][1:]}

    for title, key in (
        ("Test AUC", "auc"),
        ("Test GAUC by carrier", "gauc"),
        ("Test logloss", "logloss"),
        ("Test calibration", "calibration"),
    ):
        assert rows[title] == pytest.approx([base[key], slim[key], slim[key] - base[key]], abs=5.001e-5)
    for title, key, digits in (
        ("Embedding parameters", "embedding_parameters", 0),
        ("All parameters", "parameters", 0),
        ("Training time (s)", "seconds", 1),
        ("Training speed (samples/s)", "samples_per_second", 0),
        ("Inference speed (samples/s)", "inference_samples_per_second", 0),
    ):
        assert rows[title][:2] == [round(base[key], digits), round(slim[key], digits)]
        assert rows[title][2] == pytest.approx(100 * (slim[key] / base[key] - 1), abs=0.051)
    mib = [4 * side["embedding_parameters"] / 1024**2 for side in (base, slim)]
    assert rows["Embedding memory (MiB, float32)"][:2] == pytest.approx(mib, abs=0.0051)
    assert len(rows) == 10


def test_plan_table_is_that_of_the_plan_and_the_scores(make_run: MakeRun) -> None:
    run = make_run()
    plan = json.loads((run / "search" / "plan.json").read_text())["tables"]
    scores = np.load(run / "search" / "saliency.npz")
    rows = {row[0]: row[1:] for row in Page(write_report(run)).tables[1][1:]}
    assert rows.keys() == plan.keys()
    for name, entry in plan.items():
        n, old, new = entry["rows"], entry["original_dim"], len(entry["kept"])
        assert [value(cell) for cell in rows[name][:5]] == [n, old, new, n * old, n * new]
        share = 100 * math.fsum(scores[name])
        if share < 0.01:
            assert rows[name][5] == "<0.01\N{NO-BREAK SPACE}%"
        else:
            assert value(rows[name][5]) == pytest.approx(share, rel=1e-3)
        kept = 100 * math.fsum(scores[name][i] for i in entry["kept"]) / math.fsum(scores[name])
        assert value(rows[name][6]) == pytest.approx(kept, rel=1e-3)


def test_gauc_by_two_fields_is_not_compared(make_run: MakeRun) -> None:
    run = make_run()
    edit(run / "metrics.json", lambda metrics: metrics["retrain"].update(group_field="dest"))
    assert not any("GAUC" in row[0] for row in Page(write_report(run)).tables[0])


@pytest.mark.parametrize(
    ("fraction", "slim_auc", "headline"),
    [
        (0.09998, 0.7500, "A tenth of the embedding parameters, test AUC 0.7400 → 0.7500 (+0.0100)"),
        (0.0832, 0.7381, "8.32\N{NO-BREAK SPACE}% of the embedding parameters, test AUC 0.7400 → 0.7381 (−0.0019)"),
        (0.5, 0.74001, "Half of the embedding parameters, test AUC 0.7400 → 0.7400 (0.0000)"),
    ],
)
def test_headline(make_run: MakeRun, fraction: float, slim_auc: float, headline: str) -> None:
    run = make_run()
    edit(run / "search" / "plan.json", lambda plan: plan["reached"]["parameters"].update(fraction=fraction))
    edit(run / "metrics.json", lambda m: (m["pretrain"].update(auc=0.74), m["retrain"].update(auc=slim_auc)))
    assert headline in Page(write_report(run)).text


def test_what_a_stage_did_not_report_is_a_dash(make_run: MakeRun) -> None:
    run = make_run()

    def forget(metrics: dict) -> None:
        del metrics["slim"], metrics["search"], metrics["retrain"]["samples_per_second"]
        metrics["retrain"]["auc"] = math.nan

    edit(run / "metrics.json", forget)
    page = Page(write_report(run))
    rows = {row[0]: row[1:] for row in page.tables[0]}
    assert rows["Test AUC"] == ["0.7421", "–", "–"]
    assert rows["Training speed (samples/s)"] == ["21,034", "–", "–"]
    assert "not retrained" not in page.text


def test_padding_is_counted_apart(make_run: MakeRun) -> None:
    run = make_run({"a": 100, "b": 1000})
    edit(run / "search" / "plan.json", lambda p: p["tables"]["b"].update(kept=[1, 2], embedding_dim=2, stored_dim=4))
    page = Page(write_report(run))
    header, *rows = page.tables[1]
    b = dict(zip(header, next(row for row in rows if row[0] == "b"), strict=True))
    assert (b["Dim after"], b["Dim stored"], b["Parameters after"]) == ("2", "4", "2,000")
    assert "2,000 stored parameters beyond" in page.text


def test_embeddings_outside_the_search_are_mentioned(make_run: MakeRun) -> None:
    run = make_run({"a": 100, "b": 1000})
    edit(run / "metrics.json", lambda m: m["pretrain"].update(embedding_parameters=1100 * 65))
    assert "The search had 70,400 of the base model's 71,500 embedding parameters" in Page(write_report(run)).text


def test_odd_names_are_text_and_nothing_else(make_run: MakeRun) -> None:
    names = [
        '<b>&"',
        "$x$_{a",
        "目的地",
        "'" * 50,
        "tab\tand\nline",
        "#1f2933",
        "</svg><script>x</script>",
    ]
    run = make_run(dict.fromkeys(names, 50), name="<i>&'x")
    page = Page(write_report(run))
    assert {"b", "i", "script"}.isdisjoint(tag for tag, _ in page.tags)
    shown = {row[0] for row in page.tables[1]}
    assert shown >= {
        '<b>&"',
        "$x$_{a",
        "目的地",
        "'" * 50,
        "tab\ufffdand\ufffdline",
        "</svg><script>x</script>",
    }
    assert page.text.count("$x$_{a") == 4  # the table and the three charts by field
    assert "'" in next(row for row in page.text.splitlines() if "--run-dir" in row)  # the shell's quotes


def test_a_thousand_tables_stay_legible_and_small(make_run: MakeRun) -> None:
    rows = {f"table_{i:04d}": 4 + 200_000 // (i + 1) for i in range(1000)}
    page = Page(write_report(make_run(rows)))
    assert len(page.source) < 2_000_000
    assert [row[0] for row in page.tables[1][1:]] == list(rows)  # all of them, largest first
    assert page.text.count("The 40 largest fields; 960 more are in the plan below.") == 3
    assert page.text.count("table_0039") == 4
    assert page.text.count("table_0040") == 1
    assert page.text.count("all 1,000 fields") == 1


def test_ids_are_unique_and_the_page_refers_to_nothing_else(make_run: MakeRun) -> None:
    page = Page(write_report(make_run()))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [a[key] or "" for _, a in page.tags for key in ("href", "xlink:href", "src") if key in a]
    assert all(link.startswith(("data:", "#")) for link in links)
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    labels = [a["aria-label"] or "" for _, a in page.tags if a.get("role") == "img"]
    assert len(labels) == 7 and all(len(label) > 40 for label in labels)


def test_torchrun_is_in_the_commands_of_a_run_on_several_processes(make_run: MakeRun) -> None:
    run = make_run()
    edit(run / "environment.json", lambda environment: environment.update(world_size=2))
    command = f"torchrun --nproc-per-node 2 -m sseds_rec run {run}/config.yaml --run-dir {run}-again"
    assert command in Page(write_report(run)).text


ARTEFACTS = ["config.yaml", "environment.json", "metrics.json", "search/plan.json", "search/saliency.npz"]
HISTORIES = ["pretrain/history.jsonl", "retrain/history.jsonl"]


def expect_error(run: Path, *words: str) -> None:
    with pytest.raises(UserError) as error:
        write_report(run)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
    assert not (run / "report").exists()


@pytest.mark.parametrize("artefact", ARTEFACTS + HISTORIES)
def test_missing_artefact(make_run: MakeRun, artefact: str) -> None:
    run = make_run()
    (run / artefact).unlink()
    expect_error(run, str(run / artefact), "missing")


@pytest.mark.parametrize("artefact", ARTEFACTS + HISTORIES)
@pytest.mark.parametrize("content", [b"[1, \xff{", b"[1, 2", b"[1, 2]"])
def test_damaged_artefact(make_run: MakeRun, artefact: str, content: bytes) -> None:
    run = make_run()
    (run / artefact).write_bytes(content)
    expect_error(run, str(run / artefact))


@pytest.mark.parametrize("artefact", ARTEFACTS)
def test_empty_artefact(make_run: MakeRun, artefact: str) -> None:
    run = make_run()
    (run / artefact).write_bytes(b"")
    expect_error(run, str(run / artefact))


def test_history_of_a_stage_that_took_no_step(make_run: MakeRun) -> None:
    run = make_run()
    (run / "retrain/history.jsonl").write_bytes(b"")
    assert "slim –" in Page(write_report(run)).source  # best validation AUC, in the words for the curves


def test_artefacts_that_do_not_fit_each_other(make_run: MakeRun) -> None:
    run = make_run({"a": 10, "b": 20})
    path = run / "search" / "plan.json"
    good = path.read_text()
    for change, words in (
        (lambda p: p.update(version=9), ("version 9",)),
        (lambda p: p["tables"].update(c=p["tables"]["a"]), ("saliency.npz", "'c'")),
        (lambda p: p["tables"]["b"].update(original_dim=32), ("saliency.npz", "'b'", "[64]", "[32]")),
        (lambda p: p["tables"]["b"].update(kept=[64]), ("'b'", "0..63")),
        (lambda p: p["tables"]["a"].pop("rows"), ("'a'", "rows")),
        (lambda p: p["tables"].clear(), ("tables",)),
        (lambda p: p["reached"].pop("dims"), ("the plan", "dims")),
    ):
        path.write_text(good)
        edit(path, change)
        expect_error(run, str(run), *words)


def test_unfinished_run(make_run: MakeRun) -> None:
    run = make_run()
    edit(run / "metrics.json", lambda metrics: metrics.pop("retrain"))
    expect_error(run, "metrics.json", "retrain")


def test_a_second_report_replaces_the_first(make_run: MakeRun) -> None:
    run = make_run()
    first = write_report(run).read_text()
    assert write_report(run).read_text() == first  # nothing in the page depends on the time or on chance
    edit(run / "metrics.json", lambda metrics: metrics["retrain"].update(auc=0.9))
    assert "→ 0.9000" in write_report(run).read_text()
    assert [path.name for path in (run / "report").iterdir()] == ["index.html"]


def test_errors_overlap_and_audit_are_told(make_run: Callable[..., Path]) -> None:
    run = make_run()
    plain = write_report(run).read_text()
    assert "standard errors" not in plain and "Left out one at a time" not in plain

    with np.load(run / "search/saliency.npz") as saliency:
        np.savez(run / "search/saliency_errors.npz", **{name: 0.1 * own for name, own in saliency.items()})
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["search"]["expected_overlap"] = 0.42
    (run / "metrics.json").write_text(json.dumps(metrics))
    audit = {"rank_correlation": 0.871, "regret": 0.031, "columns": [{}] * 64}
    (run / "search/audit.json").write_text(json.dumps(audit))
    page = write_report(run).read_text()
    assert "±1.96 standard errors" in page
    assert "Had the batches been others, 42\N{NO-BREAK SPACE}% of the kept dims would be the same; more batches" in page
    assert "64 dims ranked by what the loss then was agree with the scores by a rank correlation of 0.87" in page
    assert "avoid 96.9\N{NO-BREAK SPACE}% of the loss" in page

    metrics["search"]["expected_overlap"] = 0.97
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert "more batches are needed" not in write_report(run).read_text()
    np.savez(run / "search/saliency_errors.npz", tailnum=np.zeros(3))
    with pytest.raises(UserError, match=r"saliency_errors.npz: table 'tailnum' has errors \[3\]"):
        write_report(run)
