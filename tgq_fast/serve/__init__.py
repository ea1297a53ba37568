"""A page and a JSON API over item pools: browse, search by item or picture, compare pools (extra `[serve]`)."""

from tgq_fast.serve.app import create_app
from tgq_fast.serve.server import serve
from tgq_fast.serve.store import ServedPool, Shop

__all__ = ["ServedPool", "Shop", "create_app", "serve"]
