"""The connectors that TGQ-Former is compared with: same interface, same number of tokens, same budget.

:mod:`tgq_fast.models.zoo.registry` lists them all; nothing here is imported before a connector is built, so that the
configuration can read the list.
"""

from tgq_fast.models.zoo.registry import CONNECTORS, ConnectorSpec, connector_spec

__all__ = ["CONNECTORS", "ConnectorSpec", "connector_spec"]
