"""Registers the connector's name with vLLM: the entry point `kvstore_s3` of the group `vllm.general_plugins`.

vLLM calls `register` in each of its processes, with or without a connector: it must cost nothing and must not fail for
those who do not use it. So it imports one module, which vLLM's own engine imports as well; the connector follows when
somebody names it.
"""

from __future__ import annotations

import logging

_NAME = "KVStoreS3Connector"
_MODULE = "kvstore_s3.connectors.vllm"


def register() -> None:
    """Make `"kv_connector": "KVStoreS3Connector"` enough. May be called any number of times."""
    try:
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    except ImportError as error:
        # A version that keeps its factory elsewhere: whoever asks for the connector hears from vLLM that it is unknown.
        logging.getLogger(__name__).debug("%s is not registered: %s; name kv_connector_module_path", _NAME, error)
        return
    try:
        KVConnectorFactory.register_connector(_NAME, _MODULE, _NAME)
    except ValueError as error:  # registered already, by us: nobody else has this name
        logging.getLogger(__name__).debug("%s", error)
