"""The entry point that makes the connector's name known to vLLM, in processes that use it and in those that do not."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvstore_s3.connectors.vllm import plugin

FACTORY = "vllm.distributed.kv_transfer.kv_connector.factory"

LOADS_PLUGINS_AS_VLLM_DOES = f"""
import sys
from vllm.plugins import load_plugins_by_group
import {FACTORY}
before = set(sys.modules)
plugins = load_plugins_by_group("vllm.general_plugins")
plugins["kvstore_s3"]()
plugins["kvstore_s3"]()
print("imported", *sorted(set(sys.modules) - before - {{"kvstore_s3"}} - set(sys.builtin_module_names)))
from {FACTORY} import KVConnectorFactory
print("class", KVConnectorFactory.get_connector_class_by_name("KVStoreS3Connector").__module__)
"""


def test_a_vllm_without_such_a_factory_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, FACTORY, None)
    plugin.register()


@pytest.mark.engine
def test_vllm_finds_the_name_and_imports_the_connector_only_when_it_is_named():
    pytest.importorskip("vllm", reason="needs the engine environment: make test-engine")
    command = [sys.executable, "-W", "ignore", "-c", LOADS_PLUGINS_AS_VLLM_DOES]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    said = dict(line.split(maxsplit=1) for line in ran.stdout.splitlines() if line.startswith(("imported", "class")))
    ours = {name for name in said["imported"].split() if name.startswith("kvstore_s3")}
    assert ours == {f"kvstore_s3.{name}" for name in ("connectors", "connectors.vllm", "connectors.vllm.plugin")}
    assert not {"aiobotocore", "kvstore_s3.store"} & set(said["imported"].split())
    assert said["class"] == "kvstore_s3.connectors.vllm.connector"
