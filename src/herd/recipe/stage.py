"""What a stage is: a config class, the earlier stages it reads, and one function from directories to a directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from herd.config import Config, parse_config
from herd.errors import UsageError, near
from herd.recipe.loading import Recipe


@dataclass(frozen=True)
class StageContext:
    """What a stage may know about its run besides its own config and inputs."""

    recipe: Recipe
    directories: Mapping[str, Path]
    """Directories of all stages before this one, also of those that are not its inputs."""
    command: str
    """The command line that brings this run up to date."""


RunFunction = Callable[[Any, Mapping[str, Path], Path, StageContext], str]


@dataclass(frozen=True)
class Stage:
    """One kind of stage.

    `run(config, inputs, out, context)` reads the input directories, writes its artefacts into `out` and returns one
    line that says what came out. `version` is raised when the code's results change, so that old results are made
    again. `fingerprint(config)` describes what the stage reads from outside the run (files named in its config).
    `check(config, configs of the stages before it)` raises UsageError for what no single config shows to be wrong, so
    that it is refused before anything runs. `needs(config)` are the errors of what it would read from outside the run
    and does not find. `check_ranks(config, ranks)` raises UsageError where so many ranks cannot run it.
    A `resumes` stage continues from what it left in `out`; any other one starts in an empty directory. A stage with
    `ranks` is run by all ranks that torchrun started, any other one by the first alone. `judges` are fields of its
    config that decide only whether what it made is good enough: a resuming stage goes on where it is with others. So it
    does with other `gates`, which decide only whether it goes on on the way: what is done is not asked again.
    """

    name: str
    config: type[Config]
    run: RunFunction
    inputs: tuple[str, ...] = ()
    optional_inputs: tuple[str, ...] = ()
    version: int = 1
    resumes: bool = False
    ranks: bool = False
    fingerprint: Callable[[Any], object] | None = None
    check: Callable[[Any, Mapping[str, Config]], None] | None = None
    needs: Callable[[Any], Sequence[UsageError]] | None = None
    check_ranks: Callable[[Any, int], None] | None = None
    judges: tuple[str, ...] = ()
    gates: tuple[str, ...] = ()


@dataclass(frozen=True)
class BoundStage:
    """A stage with its validated config and the names of the inputs that this recipe has. `missing`: what it needs from
    outside and does not find."""

    stage: Stage
    config: Config
    inputs: tuple[str, ...]
    missing: tuple[UsageError, ...] = ()

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def judges(self) -> dict[str, Any]:
        """What its result is judged by."""
        return self.config.model_dump(mode="json", include=set(self.stage.judges))


def bind(recipe: Recipe, table: Sequence[Stage], *, allow_missing: bool = False) -> list[BoundStage]:
    """Validate every stage of a recipe against the table of known stages. Raises UsageError, with `allow_missing` not
    for what is missing outside the run."""
    known = {stage.name: stage for stage in table}
    bound: list[BoundStage] = []
    earlier: list[str] = []
    for name, values in recipe.stages.items():
        where = f"{recipe.source}: {name}"
        if name not in known:
            raise UsageError(f"{where}: there is no such stage", value=name, allowed=near(name, known))
        stage = known[name]
        for needed in stage.inputs:
            if needed not in earlier:
                raise UsageError(
                    f"{where}: this stage reads the stage {needed!r}, which does not come before it",
                    fix=f"put {needed!r} before {name!r} in {recipe.source}",
                )
        filled = dict(values)
        if "seed" in stage.config.model_fields:
            filled.setdefault("seed", recipe.seed)
        inputs = stage.inputs + tuple(other for other in stage.optional_inputs if other in earlier)
        config = parse_config(stage.config, filled, where, fix=f"herd fields {name}")
        if stage.check is not None:
            try:
                stage.check(config, {other.name: other.config for other in bound})
            except UsageError as error:
                raise error.inside(where) from None
        missing = tuple(error.inside(where) for error in (stage.needs(config) if stage.needs else ()))
        if missing and not allow_missing:
            raise missing[0]
        bound.append(BoundStage(stage, config, inputs, missing))
        earlier.append(name)
    return bound
