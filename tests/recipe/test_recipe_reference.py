"""The reference of recipe fields says what the config classes check."""

from __future__ import annotations

import json
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from herd.cli import main
from herd.config import Config, parse_config
from herd.errors import UsageError
from herd.recipe import load_recipe, reference, stage_table, to_markdown
from herd.recipe.needle_grid import PromoteConfig
from herd.recipe.reference import FieldReference, _yaml
from herd.recipe.stage import bind

REPOSITORY = Path(__file__).parents[2]


def leaves(value: object, path: str = "") -> set[str]:
    """Paths of all values in nested mappings."""
    if not isinstance(value, dict) or not value:
        return {path}
    return {leaf for key, inner in value.items() for leaf in leaves(inner, f"{path}.{key}" if path else str(key))}


def below_optional(rows: Sequence[FieldReference]) -> dict[str, type[Config]]:
    """The fields of groups that may be null, by their paths, and the classes that check those groups."""
    configs: dict[str, Any] = {stage.name: stage.config for stage in stage_table()}
    found = {}
    for group in (row.path for row in rows if row.allowed == "fields, or null"):
        kind: Any = configs
        for part in group.split("."):
            kind = kind[part] if isinstance(kind, dict) else kind.model_fields[part].annotation
            kind = next((one for one in typing.get_args(kind) if one is not type(None)), kind)
        found |= {row.path: kind for row in rows if row.path.startswith(f"{group}.")}
    return found


def test_every_field_of_every_stage_is_there_once_with_its_default_and_a_description() -> None:
    stages = stage_table()
    rows = reference(stages)
    configs = {stage.name: stage.config().model_dump(mode="json") for stage in stages}
    optional = below_optional(rows)
    assert sorted(row.path for row in rows if row.path not in optional) == sorted(leaves(configs))
    assert len({row.path for row in rows}) == len(rows)
    assert {path for path in optional if path.startswith("base.promote.")} == {
        f"base.promote.{name}" for name in PromoteConfig.model_fields
    }
    assert all(row.description and row.allowed for row in rows)
    by_path = {row.path: row for row in rows}
    assert by_path["base.train.schedule"].allowed == "cosine, linear, wsd, constant"
    assert by_path["sft.train.schedule"].default == "linear" and by_path["base.train.schedule"].default == "cosine"
    assert by_path["base.model.head_dim"].allowed == "integer or null ≥ 2"
    assert by_path["corpus.heldout_fraction"].allowed == "number ≥ 0, ≤ 0.5"


def test_defaults_and_bounds_are_those_that_a_recipe_is_checked_by(tmp_path: Path) -> None:
    """Every default goes through a recipe's own parser; a value beyond any bound is refused."""
    stages, tiny = stage_table(), tmp_path / "every-stage.yaml"
    text = (REPOSITORY / "tests" / "recipe" / "tiny.yaml").read_text()
    tiny.write_text(text.replace("  sft:\n", "  extend: {}\n  sft:\n"))

    def value(path: str, text: str) -> object:
        """What a recipe has at `path` with this override."""
        room = "base.model.context_length=65536"  # for rows of any length
        bound = {one.name: one.config for one in bind(load_recipe(tiny, [room, f"{path}={text}"]), stages)}
        found: object = bound
        for part in path.split("."):
            found = found[part] if isinstance(found, dict) else getattr(found, part)
        return found

    defaults = {stage.name: stage.config() for stage in stages}
    refused, rows = 0, reference(stages)
    optional = below_optional(rows)
    for path, kind in optional.items():
        field = kind.model_fields[path.rsplit(".", 1)[1]]
        (row,) = (one for one in rows if one.path == path)
        assert row.default or field.is_required()
        assert field.is_required() or _yaml(field.get_default(call_default_factory=True)) == row.default
    for row in (one for one in rows if one.path not in optional):
        expected: object = defaults
        for part in row.path.split("."):
            expected = expected[part] if isinstance(expected, dict) else getattr(expected, part)
        if row.default:
            assert value(row.path, row.default) == expected, row
        else:
            assert "the recipe's unless given" in row.description
        for sign, beyond in (("≥ ", -1), ("> ", 0), ("≤ ", 1), ("< ", 0)):
            for bound in [part.split(sign)[1] for part in row.allowed.split(", ") if sign in part]:
                refused += 1
                with pytest.raises(UsageError, match="not valid"):
                    value(row.path, repr(float(bound) + beyond).removesuffix(".0"))
    assert refused > 100


def test_the_page_of_the_docs_is_up_to_date() -> None:
    stages = stage_table()
    page = (REPOSITORY / "docs" / "fields.md").read_text(encoding="utf-8")
    assert page == to_markdown(reference(stages), stages), "run `make docs`"


def test_the_command_finds_fields_and_errors_point_to_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["fields", "train.muon_lr", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert done.value.code == 0 and [row["path"] for row in rows] == ["base.train.muon_lr", "sft.train.muon_lr"]
    with pytest.raises(SystemExit) as done:
        main(["fields", "nonesuch"])
    assert done.value.code == 2 and "herd fields" in capsys.readouterr().err
    from herd.train import TrainConfig

    with pytest.raises(UsageError, match="herd fields base"):
        parse_config(TrainConfig, {"lr": 7}, "here", fix="herd fields base")
