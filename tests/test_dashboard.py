"""The Grafana dashboard and the page on metrics speak of metrics that there are, and of all of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from load_dashboard import Query, find_queries, make_import, read_dashboard

from kvstore_s3.connectors.vllm.measures import METRICS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"
DASHBOARD = read_dashboard()
QUERIES = list(find_queries(DASHBOARD))
ENGINE_LABELS = {"model_name", "engine", "le"}


def exported(name: str) -> set[str]:
    """The names of a metric's samples."""
    kinds = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_count", "_sum"]}
    return {f"vllm:{name}{ending}" for ending in kinds[METRICS[name].kind]}


SAMPLES = {sample: METRICS[name] for name in METRICS for sample in exported(name)}


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: f"{query.panel}-{query.legend}")
def test_a_panel_asks_for_samples_and_labels_that_there_are(query: Query):
    expr = query.expr
    assert "$" not in expr
    names = set(re.findall(r"vllm:kvstore_\w+", expr))
    assert names <= SAMPLES.keys()
    known = ENGINE_LABELS.union(*(SAMPLES[name].labels for name in names))
    used = set(re.findall(r'(\w+)=~?"', expr)) | {
        label for group in re.findall(r"by \(([^)]*)\)", expr) for label in re.split(r",\s*", group)
    }
    assert used <= known
    assert set(re.findall(r"{{(\w+)}}", query.legend)) <= known


def test_every_metric_is_on_a_panel():
    shown = " ".join(query.expr for query in QUERIES)
    missing = {name for name in METRICS if not any(sample in shown for sample in exported(name))}
    assert missing == {
        "kvstore_lookups",
        "kvstore_loads",
        "kvstore_loads_shared",
        "kvstore_saves",
        "kvstore_slab_waiting",
    }


def test_panels_do_not_overlap_and_have_numbers_of_their_own():
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(numbers) == len(set(numbers))


def test_an_import_replaces_the_one_that_is_there():
    body = make_import(DASHBOARD)
    assert body["overwrite"] is True
    assert body["dashboard"]["id"] is None
    assert body["dashboard"]["uid"] == "kvstore-s3"
    assert "id" not in DASHBOARD


@pytest.mark.parametrize("name", METRICS)
def test_the_page_explains_every_metric_and_the_values_of_its_label(name: str):
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{name}`")]
    assert len(rows) == 1
    metric = METRICS[name]
    assert metric.kind in rows[0]
    if metric.label:
        assert f"`{metric.label}`" in rows[0]
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"`{value}`" in text for value in metric.values)


def test_the_page_speaks_of_no_metric_that_there_is_not():
    named = set(re.findall(r"(?<!vllm:)\bkvstore_[a-z_]+", PAGE.read_text(encoding="utf-8")))
    assert named <= METRICS.keys() | {"kvstore_s3"}
