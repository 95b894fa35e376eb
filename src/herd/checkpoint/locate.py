"""Find the model that a user means: a path, a GGUF file, a run directory, or a repository pulled earlier.

Pulled repositories lie as plain files under `models_home()`/OWNER/NAME. Repositories that other tools downloaded into
the Hugging Face cache are found as well.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from herd.architecture import releases
from herd.errors import FileFormatError, HerdError
from herd.files import read_json_object

__all__ = ["continuing", "models_home", "pulled_repositories", "resolve"]

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]*/[A-Za-z0-9][A-Za-z0-9._\-]*")
_RUN_FILE = "run.json"
_PRETRAINED = ("extend", "base")  # stages that pretrain, the last first
_MAX_RUNS = 10_000  # directories looked at for suggestions


def models_home() -> Path:
    """Where `herd pull` puts repositories: $HERD_HOME/models, else models under the user's cache directory."""
    if home := os.environ.get("HERD_HOME"):
        return Path(home) / "models"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "herd" / "models"


def resolve(name: str | os.PathLike[str]) -> Path:
    """The path of the model that `name` means.

    A miss raises HerdError with the nearest names among releases, run directories and pulled repositories, and the
    command that gets the model.
    """
    text = os.fspath(name)
    try:
        path = Path(name).expanduser()
        is_run, exists = (path / _RUN_FILE).is_file(), path.exists()
    except (OSError, RuntimeError) as error:  # a name of 300 letters, a closed folder, the home of nobody
        reason = error.strerror if isinstance(error, OSError) else "this user has no home directory"
        raise HerdError(f"this path cannot be used ({reason})", value=text) from None
    if is_run:
        return _model_of_run(path)
    if exists:
        return path
    if _REPOSITORY.fullmatch(text):
        for place in (models_home() / text, _hub_snapshot(text)):
            if place is not None and place.is_dir():
                return place
    raise _miss(text)


def continuing(name: str | os.PathLike[str]) -> Path:
    """As `resolve`, but of a run directory the pretrained model, if it has one: a tuned model answers, it does not
    go on. Of a run that extends its context that is the extended one.
    """
    try:
        run = Path(name).expanduser()
        if (run / _RUN_FILE).is_file():
            stages = read_json_object(run / _RUN_FILE).get("stages")
            for stage in _PRETRAINED:
                entry = stages.get(stage) if isinstance(stages, dict) else None
                directory = entry.get("directory") if isinstance(entry, dict) else None
                if isinstance(directory, str) and re.fullmatch(rf"{stage}-[0-9a-f]+", directory):
                    checkpoint = run / directory / "checkpoint"
                    if checkpoint.is_dir():
                        return checkpoint.resolve()
    except (OSError, RuntimeError):
        pass  # resolve says what is wrong with it
    return resolve(name)


def pulled_repositories() -> list[str]:
    """Names (OWNER/NAME) of the repositories that are on this machine."""
    home = models_home()
    own = {f"{path.parent.name}/{path.name}" for path in home.glob("*/*") if path.is_dir()}
    hub = {path.name.removeprefix("models--").replace("--", "/", 1) for path in _hub_home().glob("models--*--*")}
    return sorted(own | hub)


def _model_of_run(directory: Path) -> Path:
    file = directory / _RUN_FILE
    model = read_json_object(file).get("model")
    if not isinstance(model, str) or not model:
        raise FileFormatError("the run has no model yet", file=file, field="model", fix="herd run RECIPE finishes it")
    path = (directory / model).resolve()
    if Path(model).is_absolute() or not path.is_relative_to(directory.resolve()):
        raise FileFormatError("must lie inside the run directory", file=file, field="model", value=model)
    if not path.exists():
        raise FileFormatError(
            "the run's model is missing", file=file, field="model", value=model, fix="herd run RECIPE"
        )
    return path


def _hub_home() -> Path:
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache)
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(home) / "hub"


def _hub_snapshot(repository: str) -> Path | None:
    """The newest snapshot of a repository in the Hugging Face cache."""
    folder = _hub_home() / ("models--" + repository.replace("/", "--"))
    reference = folder / "refs" / "main"
    try:
        revision = reference.read_text().strip()
    except OSError:
        return None
    return folder / "snapshots" / revision if re.fullmatch(r"[0-9a-f]{7,64}", revision) else None


def _runs() -> Iterator[str]:
    """Run directories near where the user stands."""
    for pattern in ("*/" + _RUN_FILE, "runs/*/" + _RUN_FILE):
        for count, file in enumerate(Path().glob(pattern)):
            if count == _MAX_RUNS:
                break
            yield str(file.parent)


def _miss(name: str) -> HerdError:
    candidates = {*releases, *_runs(), *pulled_repositories()}
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    short = name.lower().rsplit("/", 1)[-1].replace("meta-llama", "llama").replace("llama-", "llama")
    near: list[str] = []
    for text in (name.lower(), short):
        near += [by_lower[key] for key in difflib.get_close_matches(text, by_lower, n=3, cutoff=0.6)]
    near = list(dict.fromkeys(near))[:4]
    if _REPOSITORY.fullmatch(name) and not any(Path(candidate).exists() for candidate in near):
        recipe = name.removeprefix("runs/")  # where a recipe of that name leaves its model
        fix = f"herd pull {name}" if recipe == name else f"herd run {recipe} makes it"
    elif name in releases:
        fix = "herd pull OWNER/NAME gets its weights from the Hugging Face hub; then use OWNER/NAME or a path"
    else:
        fix = "give a path, or get a model with: herd pull OWNER/NAME; herd list shows the releases"
    what = "this release is not on the machine" if name in releases else "there is no such model"
    return HerdError(what, value=name, allowed=f"near names: {', '.join(near)}" if near else None, fix=fix)
