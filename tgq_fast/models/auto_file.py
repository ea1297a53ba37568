"""How the Auto classes of transformers find this package where it was not imported: a file beside the configuration.

It is run only with `trust_remote_code=True`, and does nothing but import the installed package. Without that flag, or
without the package, transformers says what is missing instead of calling itself too old.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["AUTO_CODE", "AUTO_FILE", "auto_map", "names_this_package"]

AUTO_FILE = "tgq_former.py"
AUTO_CODE = '''"""For AutoModel.from_pretrained(…, trust_remote_code=True): all code is the installed package's."""

from tgq_fast.models import TGQFormerConfig, TGQFormerModel, TGQFormerProcessor

__all__ = ["TGQFormerConfig", "TGQFormerModel", "TGQFormerProcessor"]
'''


def auto_map() -> dict[str, str]:
    """The entry of config.json and processor_config.json: Auto class → where its class is."""
    classes = {"AutoConfig": "TGQFormerConfig", "AutoModel": "TGQFormerModel", "AutoProcessor": "TGQFormerProcessor"}
    return {auto: f"{AUTO_FILE.removesuffix('.py')}.{name}" for auto, name in classes.items()}


def names_this_package(entry: object) -> bool:
    """Whether an `auto_map` is that of this package, or none; transformers puts "owner/name--" before what comes from
    the hub."""
    if entry is None:
        return True
    if not isinstance(entry, Mapping):
        return False
    return {auto: str(where).rpartition("--")[2] for auto, where in entry.items()} == auto_map()
