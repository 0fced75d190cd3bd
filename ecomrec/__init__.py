"""Search and recommendation for shops with transformers, from behaviour logs to pages that learn."""

__version__ = "0.1.0"
__all__ = ["Engine"]


def __getattr__(name: str):
    """Import `Engine` only when it is asked for, so that `import ecomrec` stays quick."""
    if name == "Engine":
        from ecomrec.search.engine import Engine

        return Engine
    raise AttributeError(f"module 'ecomrec' has no attribute {name!r}")
