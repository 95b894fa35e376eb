"""`--shrink`: a small recipe in which everything happens that happens in the full one, in the same order."""

from __future__ import annotations

import copy
import itertools
import json
import math
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml

from herd.architecture import LlamaConfig, parameter_count, releases
from herd.cli import main
from herd.errors import FileFormatError, UsageError
from herd.pretrain.config import PretrainConfig
from herd.pretrain.rows import stretches
from herd.recipe import load_recipe
from herd.recipe.shape import ModelShape
from herd.recipe.shrink import shrunk
from herd.train.schedule import lr_factor
from tests.recipe.published import NAMES, everything_at, recipes_at

RAMP: dict[str, Any] = {
    "name": "ramp",
    "stages": {
        "corpus": {"sources": ["data/a", "data/b"], "heldout_fraction": 0.3, "code": {"max_line": 7}},
        "tokenizer": {"vocab_size": 128_256, "n_specials": 256},
        "base": {
            "model": {"release": "llama3.1-8b"},
            "sources": {"a": {"weight": 3, "match": ["a/*"]}, "b": {"weight": 1, "kind": "prose", "infilling": 0.5}},
            "phases": [
                {"from_tokens": 10_000_000, "seq_len": 16_384, "batch_size": 512},
                {"from_tokens": 9_000_000_000, "seq_len": 65_536, "batch_size": 256},
            ],
            "mix": [{"from_tokens": 200_000_000, "weights": {"b": 1}}],
            "anneal": {"weights": {"a": 1, "b": 9}},
            "max_minutes": None,
            "train": {"steps": 3000, "seq_len": 4096, "batch_size": 1024, "lr": 1e-3, "warmup": 8, "anneal": 100,
                      "schedule": "cosine", "final_lr_ratio": 0.01, "precision": "bf16", "checkpoint_every": 500},
        },
    },
}  # fmt: skip


def config(data: dict[str, Any]) -> PretrainConfig:
    values = {name: value for name, value in data["stages"]["base"].items() if name in PretrainConfig.model_fields}
    return PretrainConfig.model_validate(values)


def story(run: PretrainConfig) -> list[tuple[Any, ...]]:
    """What a run is like, step by step and without repetitions: ratios of rows and tokens to the first ones, weights,
    and whether the rate rises, follows the schedule or falls to 0."""
    told: list[tuple[Any, ...]] = []
    row, starts, steps = 0, stretches(run), run.train.steps
    first = run.train.batch_size * run.train.seq_len
    factors = [lr_factor(step, steps, run.train) for step in range(steps)]
    rising = (
        sum(1 for step in range(1, steps) if factors[step] > factors[step - 1] + 1e-12) + 1 if run.train.warmup else 0
    )
    for step in range(steps):
        size = run.sizes()[run.sizes().number(step)]
        weights = next(part.weights for part in reversed(starts) if part.first <= row)
        phase = "warm" if step < rising else "anneal" if step >= steps - run.train.anneal else "on"
        now = (size.seq_len / run.train.seq_len, size.batch_size * size.seq_len / first, dict(weights), phase)
        if not told or told[-1] != now:
            told.append(now)
        row += size.batch_size
    return told


def test_every_phase_and_change_happens_in_the_same_order() -> None:
    full = copy.deepcopy(RAMP)
    small = shrunk(full, "ramp.yaml")
    before, after = story(config(RAMP)), story(config(small))
    assert full == RAMP, "the recipe's own data is as it was"
    assert [(told[0], told[2], told[3]) for told in after] == [(told[0], told[2], told[3]) for told in before]
    assert len(before) == 6 and before[-1][3] == "anneal" and before[0][3] == "warm"
    assert 12 <= config(small).train.steps <= 20
    full["stages"]["base"] |= {"anneal": {}, "phases": [*RAMP["stages"]["base"]["phases"]]}
    full["stages"]["base"]["mix"].append({"from_tokens": 10**12, "weights": {"a": 1}})
    assert len(config(shrunk(full, "ramp.yaml")).mix) == 1, "the second one is beyond the last step"


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_keeps_its_story(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipes_at(tmp_path))
    loaded = load_recipe(name)
    small = load_recipe(name, shrink=True)
    assert small.name == f"{name}-shrunk" and small.command.endswith("--shrink")
    full_base, base = (config({"stages": dict(recipe.stages)}) for recipe in (loaded, small))
    assert base.train.steps <= 20 and len(base.phases) == len(full_base.phases)
    told = story(base)
    wanted = [1, *(size.seq_len / full_base.train.seq_len for size in full_base.phases)]
    assert [length for length, _ in itertools.groupby(entry[0] for entry in told)] == [
        length for length, _ in itertools.groupby(wanted)
    ]
    assert ("warm" in [entry[3] for entry in told]) is bool(full_base.train.warmup)
    assert ("anneal" in [entry[3] for entry in told]) is bool(full_base.train.anneal)
    sizes = [full_base.train, *full_base.phases]
    rows = [size.batch_size for size in (base.train, *base.phases)]
    most = max(size.batch_size for size in sizes)
    assert rows == [max(1, round(min(4, most) * size.batch_size / most)) for size in sizes]
    for field in ("lr", "optimizer", "schedule", "final_lr_ratio", "precision", "beta2", "eps", "weight_decay", "clip"):
        assert getattr(base.train, field) == getattr(full_base.train, field), field
    assert base.train.parallel.layout(1).gpus == 1
    assert {source: entry.weight for source, entry in base.sources.items()} == {
        source: entry.weight for source, entry in full_base.sources.items()
    }
    assert [entry.infilling for entry in base.sources.values()] == [
        entry.infilling for entry in full_base.sources.values()
    ]


@pytest.mark.parametrize("name", sorted(releases))
def test_a_shape_keeps_its_structure(name: str) -> None:
    data = {"name": "x", "stages": {"base": {"model": {"release": name}, "train": {"seq_len": 2048}}}}
    full = releases[name].config
    small = ModelShape(**shrunk(data, "x.yaml")["stages"]["base"]["model"]).to_llama(512)
    assert parameter_count(small) < 4e6 and small.n_layers <= 4
    assert small.n_heads * full.n_kv_heads == full.n_heads * small.n_kv_heads
    assert small.dim * full.n_heads * full.head_dim == full.dim * small.n_heads * small.head_dim
    assert small.ffn_dim / small.dim == pytest.approx(full.ffn_dim / full.dim, rel=0.02)
    for field in ("tied_embeddings", "qk_norm", "nope_interval", "rope_theta", "norm_eps", "generation"):
        assert getattr(small, field) == getattr(full, field), field
    for field in ("moe", "attention_chunk", "attention_temperature", "rope_scaling"):
        assert (getattr(small, field) is None) is (getattr(full, field) is None), field
    if full.moe and small.moe:
        kinds = {small.is_moe_layer(layer) for layer in range(small.n_layers)}
        assert kinds == {full.is_moe_layer(layer) for layer in range(full.n_layers)}
        assert {small.uses_rope(layer) for layer in range(small.n_layers)} == {True, False}
        assert small.moe.top_k == 1 and small.moe.n_experts == 4
    if full.rope_scaling and small.rope_scaling:
        assert (
            small.rope_scaling.kind == full.rope_scaling.kind and small.rope_scaling.factor == full.rope_scaling.factor
        )
        assert small.rope_scaling.original_context == full.rope_scaling.original_context * 256 // 2048
    assert small.context_length == full.context_length * 256 // 2048


def test_lengths_are_divided_alike_and_rows_stay_parts_of_the_longest() -> None:
    small = config(shrunk(RAMP, "ramp.yaml"))
    assert [small.train.seq_len, *(size.seq_len for size in small.phases)] == [16, 64, 256]
    odd = copy.deepcopy(RAMP)
    odd["stages"]["base"]["phases"] = [{"from_tokens": 10_000_000, "seq_len": 4096 * 7, "batch_size": 100}]
    small = config(shrunk(odd, "odd.yaml"))
    assert small.phases[0].seq_len == 7 * small.train.seq_len and 200 < small.phases[0].seq_len <= 256
    shape = shrunk(RAMP, "ramp.yaml")["stages"]["base"]["model"]
    assert shape["context_length"] == 131_072 // 256 and shape["rope_scaling"]["original_context"] == 8192 // 256


def test_a_small_model_with_short_rows_stays() -> None:
    data = {"stages": {"base": {"model": {"dim": 96, "n_heads": 3}, "train": {"seq_len": 128, "batch_size": 2}}}}
    base = shrunk({"name": "x", **data}, "x.yaml")["stages"]["base"]
    assert (base["model"]["dim"], base["model"]["n_layers"], base["model"]["context_length"]) == (96, 4, 512)
    assert (base["train"]["seq_len"], base["train"]["batch_size"]) == (128, 2)


def test_figures_are_lowered_and_never_raised() -> None:
    data = copy.deepcopy(RAMP)
    data["stages"]["base"] |= {"evaluations": 0, "probe_tokens": 99}
    data["stages"] |= {"evaluate": {"exercises": 5, "heldout_bytes": None}, "sft": {"max_turns": 9}}
    found = shrunk(data, "x.yaml")["stages"]
    assert (found["base"]["evaluations"], found["base"]["probe_tokens"]) == (0, 99)
    assert (found["evaluate"]["exercises"], found["evaluate"]["heldout_bytes"], found["evaluate"]["shots"]) == (
        5,
        5000,
        1,
    )
    assert found["sft"]["max_turns"] == 1 and found["sft"]["epochs"] is None and found["sft"]["train"]["seq_len"] <= 512


def test_every_source_has_a_part_of_the_text_and_no_document_two() -> None:
    data = copy.deepcopy(RAMP)
    data["stages"]["base"]["sources"] = {f"s{i}": {"weight": i + 1, "shards": ["x"]} for i in range(7)}
    data["stages"]["base"]["mix"], data["stages"]["base"]["anneal"] = [], {}
    found = shrunk(data, "x.yaml")["stages"]
    assert found["corpus"] == {"sources": ["python-stdlib"], "heldout_fraction": 0.01, "code": {"max_line": 7}}
    assert found["tokenizer"] == {"vocab_size": 512, "n_specials": 16}
    urls = [f"python-stdlib/{letter}bc/{other}.py" for letter in "aABbcxyz_0" for other in "abcdefg"]
    sources = list(found["base"]["sources"].values())
    assert all(source["shards"] == [] and source["kind"] is None for source in sources)
    for url in urls:
        fits = [
            number for number, source in enumerate(sources[:-1]) if any(fnmatchcase(url, m) for m in source["match"])
        ]
        letter = url.removeprefix("python-stdlib/")[0].lower()
        number = (ord(letter) - ord("a")) % 7 if letter.isalpha() else 6
        assert fits == ([number] if number < 6 else []), url
    assert sources[-1]["match"] == []


def test_another_folder_is_read_by_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "my [notes]"
    folder.mkdir()
    found = shrunk(RAMP, "x.yaml", text=str(folder))["stages"]
    assert found["corpus"]["sources"] == [str(folder)]
    assert fnmatchcase("my [notes]/all.txt", found["base"]["sources"]["a"]["match"][0])
    assert not fnmatchcase("my n/all.txt", found["base"]["sources"]["a"]["match"][0])
    with pytest.raises(UsageError, match="no folder"):
        shrunk(RAMP, "x.yaml", text=str(tmp_path / "none"))


def test_runs_of_other_recipes_are_their_shrunk_ones_and_other_checkpoints_stay() -> None:
    data = copy.deepcopy(RAMP)
    data["stages"]["tokenizer"] = {"file": "runs/llama2-7b"}
    data["stages"]["base"] |= {
        "init_from": "runs/llama2-7b",
        "adapt": {},
        "distil": {"teachers": ["runs/big", "meta-llama/Llama-2-7b", "/data/runs/x"], "weight": 0.25},
    }
    found = shrunk(data, "x.yaml")["stages"]
    assert found["tokenizer"] == {"file": "runs/llama2-7b-shrunk"}
    assert found["base"]["init_from"] == "runs/llama2-7b-shrunk"
    teachers = ["runs/big-shrunk", "meta-llama/Llama-2-7b", "/data/runs/x"]
    assert found["base"]["distil"] == {"teachers": teachers, "weight": 0.25}
    assert found["base"]["adapt"] == {"calibration_rows": 16, "calibration_tokens": 256}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8, 16])
@pytest.mark.parametrize(
    "name", ["llama3.1-405b", "llama3.1-long-405b", "llama4-maverick", "llama1-33b", "meditron-70b"]
)
def test_a_layout_fits_the_ranks_there_are(
    name: str, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipes_at(tmp_path))
    full = config({"stages": dict(load_recipe(name).stages)}).train.parallel
    recipe = load_recipe(name, shrink=True, ranks=ranks)
    base = config({"stages": dict(recipe.stages)})
    parallel = base.train.parallel
    shape = ModelShape(**recipe.stages["base"]["model"]).to_llama(512)
    for size in (base.train, *base.phases):
        rows = base.train.micro_batch_rows
        layout = parallel.check(shape, size.seq_len, size.batch_size, rows, ranks)
        if parallel.pp > 1:
            assert rows == 1 and size.batch_size // layout.dp % parallel.pp == 0
    several = [axis for axis in ("tp", "pp", "cp") if getattr(full, axis) > 1]
    halvings = int(math.log2(ranks & -ranks))
    assert [axis for axis in ("tp", "pp", "cp") if getattr(parallel, axis) == 2] == [
        axis for axis in several if axis != "tp" or name != "llama1-33b"
    ][:halvings], "two ranks for the axes that have several, as far as they go"
    assert parallel.shard == full.shard and parallel.schedule == (full.schedule if parallel.pp > 1 else "1f1b")
    if name == "llama4-maverick" and ranks >= 4 and halvings >= 2:
        assert parallel.ep == 2


def test_sizes_are_chosen_by_name_and_by_override(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    text = {
        "name": "fam",
        "sizes": {"a": {}, "b": {"two": {"x": {"y": 5}}, "one": False}, "c": None},
        "stages": {"one": {}, "two": {"x": {"y": 1, "z": 2}, "w": [1]}},
    }
    (tmp_path / "recipes" / "fam.yaml").write_text(yaml.safe_dump(text, sort_keys=False))
    first = load_recipe("fam")
    assert first.name == "fam-a" and first.stages == text["stages"] and list(first.stages) == ["one", "two"]
    for chosen in (load_recipe("fam-b"), load_recipe("recipes/fam.yaml", ["size=b"])):
        assert chosen.name == "fam-b" and chosen.stages == {"two": {"x": {"y": 5, "z": 2}, "w": [1]}}
        assert chosen.command == "herd run recipes/fam.yaml size=b"
    assert load_recipe("fam-b", ["two.x.y=7", "name=mine"]).stages == {"two": {"x": {"y": 7, "z": 2}, "w": [1]}}
    assert load_recipe("fam-c").stages == text["stages"]
    for path, overrides, words in (
        ("fam-d", [], "there is no such size; got d; allowed: a, b, c"),
        ("fam", ["size=d"], "there is no such size; got d"),
        ("fom", [], "there is no such recipe file"),
    ):
        with pytest.raises(UsageError, match=words):
            load_recipe(path, overrides)
    text["sizes"]["d"] = {"three": {}}
    (tmp_path / "recipes" / "fam.yaml").write_text(yaml.safe_dump(text))
    with pytest.raises(UsageError, match="size d names a stage that this recipe does not have; got three"):
        load_recipe("fam-d")
    for sizes, words in (("[a]", "sizes are a mapping"), ("{a: [one]}", "a size is a mapping of stages")):
        (tmp_path / "recipes" / "bad.yaml").write_text(f"sizes: {sizes}\nstages: {{one: {{}}}}")
        with pytest.raises(FileFormatError, match=words):
            load_recipe("bad")
    (tmp_path / "recipes" / "one.yaml").write_text("stages: {one: {}}")
    with pytest.raises(UsageError, match="one size only"):
        load_recipe("one-b")


def test_overrides_change_the_small_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipes_at(tmp_path))
    recipe = load_recipe("llama1-7b", ["base.train.steps=40", "base.train.lr=1e-3"], shrink=True)
    assert recipe.stages["base"]["train"]["steps"] == 40 and recipe.stages["base"]["train"]["lr"] == 1e-3
    assert recipe.command == "herd run recipes/llama1.yaml size=7b base.train.steps=40 base.train.lr=1e-3 --shrink"


def test_a_recipe_that_is_wrong_is_said_before_it_is_made_small(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("stages: {base: {train: {steps: -1}}}")
    with pytest.raises(UsageError, match=r"base: field 'train\.steps' is not valid; got -1"):
        load_recipe(file, shrink=True)
    file.write_text("stages: {base: {model: {release: llama3.1-9b}}}")
    with pytest.raises(UsageError, match=r"there is no release 'llama3.1-9b'; did you mean 'llama3.1-8b'"):
        load_recipe(file, shrink=True)


def test_a_release_gives_the_sizes_that_a_recipe_does_not() -> None:
    for name, release in releases.items():
        assert ModelShape(release=name).to_llama(release.config.vocab_size) == release.config
    changed = ModelShape(release="llama3.1-8b", n_layers=3, rope_scaling=None, context_length=99)
    config: LlamaConfig = changed.to_llama(128_256)
    assert (config.n_layers, config.rope_scaling, config.context_length, config.dim) == (3, None, 99, 4096)


def test_a_dry_run_shows_the_small_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    monkeypatch.chdir(everything_at(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")

    def herd(*arguments: str) -> int | str | None:
        with pytest.raises(SystemExit) as left:
            main(list(arguments))
        return left.value.code

    assert herd("run", "llama3.1-405b", "--shrink", "--dry-run", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["run"] == str(Path("runs") / "llama3.1-405b-shrunk")
    base = next(stage["config"] for stage in shown["stages"] if stage["stage"] == "base")
    assert base["model"]["dim"] == 256 and base["train"]["parallel"]["tp"] == 2 and base["train"]["steps"] == 12
    assert herd("run", "llama1", "--text", ".") == 2
    assert "--text" in capsys.readouterr().err
