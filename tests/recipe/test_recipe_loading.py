"""Recipe files and overrides: what is read, and how every wrong one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from herd.errors import FileFormatError, HerdError, UsageError
from herd.recipe import load_recipe
from herd.recipe.stage import bind


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_mapping_and_list_of_stages_are_the_same(tmp_path: Path) -> None:
    mapping = write(tmp_path / "a.yaml", "name: x\nstages:\n  one: {a: 1}\n  two:\n  three: {b: [1, 2]}\n")
    listing = write(tmp_path / "b.yaml", "name: x\nstages:\n  - one: {a: 1}\n  - two\n  - three: {b: [1, 2]}\n")
    assert (
        load_recipe(mapping).stages
        == load_recipe(listing).stages
        == {"one": {"a": 1}, "two": {}, "three": {"b": [1, 2]}}
    )
    assert list(load_recipe(listing).stages) == ["one", "two", "three"]


def test_name_defaults_to_the_file_and_seed_to_zero(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path / "tiny.yaml", "stages: {one: {}}"))
    assert (recipe.name, recipe.seed, recipe.description) == ("tiny", 0, "")


def test_overrides_are_yaml_values_and_reach_into_nested_fields(tmp_path: Path) -> None:
    file = write(tmp_path / "r.yaml", "name: x\nstages:\n  corpus: {sources: [a]}\n  base: {train: {lr: 1}}\n  sft:\n")
    recipe = load_recipe(
        file,
        [
            "corpus.sources=[/some where/a, b.txt]",
            "base.train.lr=3e-3",
            "base.train.decay=true",
            "base.model.dim=256",
            "sft.name=a=b",
            "seed=7",
        ],
    )
    assert recipe.stages == {
        "corpus": {"sources": ["/some where/a", "b.txt"]},
        "base": {"train": {"lr": 0.003, "decay": True}, "model": {"dim": 256}},
        "sft": {"name": "a=b"},
    }
    assert recipe.seed == 7


def test_a_stage_set_to_false_is_left_out(tmp_path: Path) -> None:
    file = write(tmp_path / "r.yaml", "stages: {base: {}, sft: {a: 1}}")
    assert list(load_recipe(file, ["sft=false"]).stages) == ["base"]


def test_switches_are_words_and_only_true_and_false_are_booleans(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path / "r.yaml", "stages: {s: {a: off, b: yes, c: True, d: false, e: truely}}"))
    assert recipe.stages["s"] == {"a": "off", "b": "yes", "c": True, "d": False, "e": "truely"}
    assert load_recipe(tmp_path / "r.yaml", ["s.a=on"]).stages["s"]["a"] == "on"


def test_yaml_exponents_are_numbers(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path / "r.yaml", "stages: {s: {a: 3e-4, b: 1E6, c: -2.5e+3, d: .5e1, e: 3e, f: e3}}")
    )
    assert recipe.stages["s"] == {"a": 3e-4, "b": 1e6, "c": -2500.0, "d": 5.0, "e": "3e", "f": "e3"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stages: {a: {x: 1, x: 2}}", ["'x'", "twice", "line 1"]),
        ("stages: [a, a]", ["stages"]),
        ("stages: [{a: 1, b: 2}]", ["stages"]),
        ("stages: {}", ["at least one stage"]),
        ("name: x", ["at least one stage"]),
        ("- a\n- b", ["mapping"]),
        ("stages: {a: [1]}", ["'a'", "a mapping of its fields"]),
        ("stages: {a: {}}\nsede: 1", ["'sede'", "did you mean 'seed'"]),
        ("stages: {a: {}}\nseed: -1", ["seed", "-1"]),
        ("stages: {a: {}}\nseed: yes", ["seed"]),
        ("stages: {a: {}}\nname: ../up", ["name", "../up"]),
        ("stages: {a: {}}\nname: ''", ["name"]),
        ("stages: {a: ", ["not valid YAML", "line"]),
        ("stages: {a: !!python/object/apply:os.getcwd []}", ["not valid YAML"]),
        ("stages: {? [1, 2] : {}}", ["not valid YAML"]),
        ("stages: {a: {day: 2024-99-99}}", ["not valid YAML", "month"]),
        ("stages: " + "[" * 1200, ["not valid YAML"]),
    ],
)
def test_wrong_recipes_are_refused_with_the_place(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(HerdError) as caught:
        load_recipe(write(tmp_path / "r.yaml", text))
    for word in words:
        assert word in str(caught.value)


def test_a_recipe_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"name: \xff")
    with pytest.raises(FileFormatError, match="UTF-8"):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("base.lr", ["stage.field=value"]),
        ("=3", ["stage.field=value"]),
        ("base..lr=3", ["stage.field=value"]),
        ("bose.lr=3", ["bose.lr=3", "did you mean 'base'"]),
        ("base.lr=[1", ["not valid YAML", "base.lr"]),
        ("base.lr=2024-99-99", ["not valid YAML", "base.lr"]),
        ("base.steps.x=1", ["base.steps", "'x'"]),
        ("base=3", ["'base'"]),
    ],
)
def test_wrong_overrides_are_refused(tmp_path: Path, override: str, words: list[str]) -> None:
    file = write(tmp_path / "r.yaml", "stages: {base: {steps: 3}}")
    with pytest.raises(UsageError) as caught:
        load_recipe(file, [override])
    for word in words:
        assert word in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_bare_name_is_found_in_recipes_and_a_miss_names_the_near_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    write(tmp_path / "recipes" / "pocket.yaml", "stages: {a: {}}")
    assert load_recipe("pocket").name == "pocket"
    with pytest.raises(UsageError, match=r"recipes/pocket\.yaml"):
        load_recipe("recipes/poket.yaml")


def test_binding_validates_every_stage(workshop, recipe_file: Path) -> None:
    table = workshop.table()
    bound = bind(load_recipe(recipe_file), table)
    assert [stage.name for stage in bound] == ["words", "count", "square"]
    assert bound[1].config.seed == 5, "the recipe's seed reaches stages that have one"
    assert bind(load_recipe(recipe_file, ["count.seed=9"]), table)[1].config.seed == 9
    assert bound[2].inputs == ("count", "words")
    for override, words in {
        "count.topp=1": ["count", "'topp'", "did you mean 'top'"],
        "count.top=0": ["count", "top"],
        "count.top=many": ["count", "top", "many"],
    }.items():
        with pytest.raises(UsageError) as caught:
            bind(load_recipe(recipe_file, [override]), table)
        for word in words:
            assert word in str(caught.value)


def test_unknown_stages_and_missing_inputs_are_refused(workshop, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'count'"):
        bind(load_recipe(write(tmp_path / "r.yaml", "stages: {cuont: {}}")), workshop.table())
    with pytest.raises(UsageError, match="'words', which does not come before"):
        bind(load_recipe(write(tmp_path / "r.yaml", "stages: [count, words: {sources: [x]}]")), workshop.table())
