"""checkpoint: weights ⇄ files. Hugging Face safetensors, Meta's .pth and GGUF behind one mapping; without torch."""

from herd.checkpoint.convert import convert, verify
from herd.checkpoint.hub import pull
from herd.checkpoint.locate import models_home, pulled_repositories, resolve
from herd.checkpoint.reading import Checkpoint, RawTensor, open_checkpoint
from herd.checkpoint.writing import save

__all__ = [
    "Checkpoint",
    "RawTensor",
    "convert",
    "models_home",
    "open_checkpoint",
    "pull",
    "pulled_repositories",
    "resolve",
    "save",
    "verify",
]
