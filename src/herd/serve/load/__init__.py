"""`herd bench serve`: what users of a server would see, at which load. For any server that speaks OpenAI's API."""

from herd.serve.load.generator import LoadConfig, Loaded, run

__all__ = ["LoadConfig", "Loaded", "run"]
