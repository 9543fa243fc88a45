"""Load the Grafana dashboard of the vLLM connector, and see whether a Prometheus has what its panels show.

    python examples/load_dashboard.py grafana http://grafana:3000 --token-file token
    python examples/load_dashboard.py check http://prometheus:9090

`grafana` creates or replaces the dashboard over Grafana's HTTP API, with a service account's token that may write
dashboards. `check` runs the queries of all panels, and exits with 1 if some give no data.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode
from urllib.request import Request, urlopen

DASHBOARD = Path(__file__).resolve().parents[1] / "docs" / "dashboards" / "kvstore-s3.json"
TIMEOUT_S = 30.0


class Query(NamedTuple):
    """One query of a panel, with the dashboard's variables filled in."""

    panel: str
    legend: str
    expr: str


def read_dashboard(path: Path = DASHBOARD) -> dict[str, Any]:
    dashboard: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return dashboard


def find_queries(dashboard: dict[str, Any], *, rate_interval: str = "5m") -> Iterator[Query]:
    """All queries, for all models and engines."""
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            expr = target["expr"].replace("$__rate_interval", rate_interval)
            for variable in dashboard["templating"]["list"]:
                expr = expr.replace(f"${variable['name']}", variable.get("allValue", ""))
            yield Query(panel["title"], target["legendFormat"], expr)


def make_import(dashboard: dict[str, Any]) -> dict[str, Any]:
    """The body of Grafana's POST /api/dashboards/db: one with this uid is replaced."""
    return {"dashboard": {**dashboard, "id": None}, "overwrite": True, "message": "kvstore_s3"}


def load(url: str, token: str, dashboard: dict[str, Any]) -> str:
    """Load it into the Grafana at `url`; where it is then to be seen."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    body = json.dumps(make_import(dashboard)).encode()
    answer = _ask(Request(f"{url.rstrip('/')}/api/dashboards/db", body, headers))
    return url.rstrip("/") + str(answer["url"])


def ask_prometheus(url: str, expr: str) -> list[dict[str, Any]]:
    """The series that `expr` gives now."""
    answer = _ask(Request(f"{url.rstrip('/')}/api/v1/query?{urlencode({'query': expr})}"))
    result: list[dict[str, Any]] = answer["data"]["result"]
    return result


def check(url: str, dashboard: dict[str, Any]) -> list[Query]:
    """The queries that give no data."""
    return [query for query in find_queries(dashboard) if not ask_prometheus(url, query.expr)]


def _ask(request: Request) -> dict[str, Any]:
    with urlopen(request, timeout=TIMEOUT_S) as answer:
        value: dict[str, Any] = json.load(answer)
        return value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    grafana = verbs.add_parser("grafana", help="load the dashboard")
    grafana.add_argument("url")
    grafana.add_argument("--token-file", type=Path, required=True, help="file that holds the service account's token")
    prometheus = verbs.add_parser("check", help="run all its queries")
    prometheus.add_argument("url")
    asked = parser.parse_args()
    dashboard = read_dashboard()
    if asked.verb == "grafana":
        print(load(asked.url, asked.token_file.read_text(encoding="utf-8").strip(), dashboard))
        return 0
    empty = check(asked.url, dashboard)
    for query in empty:
        print(f"no data: {query.panel}, {query.legend}: {query.expr}")
    print(f"{sum(1 for _ in find_queries(dashboard)) - len(empty)} queries give data, {len(empty)} do not")
    return 1 if empty else 0


if __name__ == "__main__":
    sys.exit(main())
