"""The recipes with published numbers: each is valid, and each number is that of the papers and model cards.

The numbers are written here a second time, from the cards and papers and not from the recipes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from herd.architecture import parameter_count
from herd.errors import UsageError
from herd.recipe import load_recipe, place, stage_table
from tests.recipe.published import NAMES, RECIPES, everything_at

pytest.importorskip("torch")

from herd.recipe.stages import BaseConfig

M4, M16 = 2**22, 2**24

# Learning rate at its peak and its end, warm-up, tokens of the first step and of a row, of the run, parameters.
LLAMA_1 = {
    "llama1-7b": (3e-4, 3e-5, 2000, M4, 2048, 1.0e12, 6_738_415_616),
    "llama1-13b": (3e-4, 3e-5, 2000, M4, 2048, 1.0e12, 13_015_864_320),
    "llama1-33b": (1.5e-4, 1.5e-5, 2000, M4, 2048, 1.4e12, 32_528_943_616),
    "llama1-65b": (1.5e-4, 1.5e-5, 2000, M4, 2048, 1.4e12, 65_285_660_672),
}
LLAMA_2 = {
    "llama2-7b": (3e-4, 3e-5, 2000, M4, 4096, 2.0e12, 6_738_415_616),
    "llama2-13b": (3e-4, 3e-5, 2000, M4, 4096, 2.0e12, 13_015_864_320),
    "llama2-34b": (1.5e-4, 1.5e-5, 2000, M4, 4096, 2.0e12, 33_743_970_304),
    "llama2-70b": (1.5e-4, 1.5e-5, 2000, M4, 4096, 2.0e12, 68_976_648_192),
}
CODE = {
    "codellama-7b": (3e-4, 1e-5, 1000, M4, 4096, 500e9, 6_738_546_688),
    "codellama-13b": (3e-4, 1e-5, 1000, M4, 4096, 500e9, 13_016_028_160),
    "codellama-34b": (1.5e-4, 5e-6, 1000, M4, 4096, 500e9, 33_743_970_304),
    "codellama-70b": (1.5e-4, 5e-6, 1000, M4, 4096, 1e12, 68_976_910_336),
    "codellama-7b-plain": (3e-4, 1e-5, 1000, M4, 4096, 500e9, 6_738_415_616),
    "codellama-13b-plain": (3e-4, 1e-5, 1000, M4, 4096, 500e9, 13_015_864_320),
    "codellama-python-7b": (1e-4, 1e-4 / 30, 1000, M4, 4096, 100e9, 6_738_415_616),
    "codellama-python-13b": (1e-4, 1e-4 / 30, 1000, M4, 4096, 100e9, 13_015_864_320),
    "codellama-python-34b": (1e-4, 1e-4 / 30, 1000, M4, 4096, 100e9, 33_743_970_304),
    "codellama-python-70b": (1e-4, 1e-4 / 30, 1000, M4, 4096, 100e9, 68_976_910_336),
    "codellama-long-7b": (2e-5, None, 0, 2**21, 16_384, 3_000 * 2**21, 6_738_546_688),
    "codellama-long-13b": (2e-5, None, 0, 2**21, 16_384, 10_000 * 2**21, 13_016_028_160),
    "codellama-long-34b": (2e-5, None, 0, 2**20, 16_384, 11_000 * 2**20, 33_743_970_304),
}
LLAMA_3 = {
    "llama3-8b": (3e-4, 3e-6, 8000, M4, 8192, 15e12, 8_030_261_248),
    "llama3-70b": (1.5e-4, 1.5e-6, 8000, M4, 8192, 15e12, 70_553_706_496),
    "llama3.1-8b": (3e-4, 3e-6, 8000, M4, 4096, None, 8_030_261_248),
    "llama3.1-70b": (1.5e-4, 1.5e-6, 8000, M4, 4096, None, 70_553_706_496),
    "llama3.1-405b": (8e-5, 8e-7, 8000, M4, 4096, None, 405_853_388_800),
    "llama3.1-long-8b": (3e-6, 0, 0, M16, 16_384, 800e9, 8_030_261_248),
    "llama3.1-long-70b": (1.5e-6, 0, 0, M16, 16_384, 800e9, 70_553_706_496),
    "llama3.1-long-405b": (8e-7, 0, 0, M16, 16_384, 800e9, 405_853_388_800),
    "llama3.2-1b": (3e-4, 3e-6, 8000, M4, 8192, 9e12, 1_235_814_400),
    "llama3.2-3b": (3e-4, 3e-6, 8000, M4, 8192, 9e12, 3_212_749_824),
}
OTHERS = {
    "llama4-scout": (3e-4, 3e-5, 2000, M16, 8192, 40e12, 107_769_861_120),
    "llama4-maverick": (3e-4, 3e-5, 2000, M16, 8192, 22e12, 400_711_848_960),
    "meditron-7b": (3e-4, 1e-6, 2000, 1600 * 2048, 2048, 48.1e9, 6_738_415_616),
    "meditron-70b": (1.5e-4, 1e-6, 2000, 512 * 4096, 4096, 48.1e9, 68_976_648_192),
}
NUMBERS = LLAMA_1 | LLAMA_2 | CODE | LLAMA_3 | OTHERS

SHARES = {
    "llama1": {"commoncrawl": 67, "c4": 15, "github": 4.5, "wikipedia": 4.5, "books": 4.5, "arxiv": 2.5,
               "stackexchange": 2},
    "codellama": {"code": 85, "code_language": 8, "language": 7},
    "codellama-python": {"python": 75, "code": 10, "code_language": 10, "language": 5},
    "llama3": {"knowledge": 50, "math": 25, "code": 17, "multilingual": 8},
    "llama3.1": {"knowledge": 50, "math": 25, "code": 17, "multilingual": 8},
}  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return everything_at(tmp_path_factory.mktemp("project"))


@pytest.fixture
def configs(project: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The validated stages of a recipe, by name."""
    monkeypatch.chdir(project)

    def read(name: str) -> dict[str, Any]:
        placed = place(load_recipe(name), stage_table(), Path("runs") / name)
        return {item.name: item.bound.config for item in placed}

    return read


def test_every_recipe_is_here() -> None:
    assert set(NUMBERS) == set(NAMES) - {"pocket"}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_recipe_is_valid_and_has_the_published_numbers(name: str, configs: Any) -> None:
    stages = configs(name)
    base: BaseConfig = stages["base"]
    train = base.train
    lr, end, warmup, step, row, tokens, parameters = NUMBERS[name]
    assert (train.lr, train.warmup) == (lr, warmup)
    if end is None:
        assert train.schedule == "constant"
    elif end == 0:
        assert train.anneal == 3, "falls to 0 at the end"
    else:
        assert train.schedule == "cosine" and train.lr * train.final_lr_ratio == pytest.approx(end, rel=1e-4)
    assert (train.seq_len, train.batch_size * train.seq_len) == (row, step)
    if tokens is not None:
        assert base.sizes().tokens_before(train.steps) == pytest.approx(tokens, abs=step)
    vocabulary = {"llama1": 32_000, "llama2": 32_000, "codellama": 32_000, "meditron": 32_000, "llama4": 202_048}
    wanted = next((size for family, size in vocabulary.items() if name.startswith(family)), 128_256)
    if stages["tokenizer"].file is None:
        assert stages["tokenizer"].vocab_size == wanted
    marks = name in ("codellama-7b", "codellama-13b", "codellama-70b")
    assert stages["tokenizer"].infilling is marks
    wider = marks or name in ("codellama-long-7b", "codellama-long-13b", "codellama-python-70b")
    assert parameter_count(base.model.to_llama(wanted + 16 * wider)) == parameters


def test_the_optimiser_is_adamw_as_published(configs: Any) -> None:
    for name in LLAMA_1 | LLAMA_2 | {"meditron-7b": 0, "meditron-70b": 0}:
        train = configs(name)["base"].train
        assert train.optimizer == "adamw" and (train.beta1, train.beta2) == (0.9, 0.95)
        assert (train.weight_decay, train.clip) == (0.1, 1.0)
        assert train.eps == (1e-8 if name.startswith("llama1") else 1e-5)
    for name in CODE:
        train = configs(name)["base"].train
        assert train.optimizer == "adamw" and (train.beta1, train.beta2) == (0.9, 0.95)


def test_the_mixtures_are_the_published_ones(configs: Any) -> None:
    for name in NUMBERS:
        family = name.rsplit("-", 1)[0].removesuffix("-7b").removesuffix("-13b")
        if family in SHARES:
            base = configs(name)["base"]
            assert {source: entry.weight for source, entry in base.sources.items()} == SHARES[family], name
    meditron = configs("meditron-7b")["base"].sources
    total = sum(source.weight for source in meditron.values())
    assert meditron["replay"].weight / total == pytest.approx(0.4 / 48.1, abs=0.002)
    assert list(meditron) == ["guidelines", "abstracts", "papers", "replay"]


def test_code_llama_infills_where_it_did(configs: Any) -> None:
    for name in CODE:
        shares = {source.infilling for source in configs(name)["base"].sources.values()}
        fills = name in ("codellama-7b", "codellama-13b", "codellama-70b", "codellama-long-7b", "codellama-long-13b")
        assert shares == ({0.9} if fills else {0}), name


def test_contexts_and_rotations_of_every_stage(configs: Any) -> None:
    def rope(name: str) -> tuple[float, int, tuple[float, int] | None]:
        model = configs(name)["base"].model
        scaling = model.rope_scaling
        stretched = None if scaling is None else (scaling.factor, scaling.original_context)
        return model.rope_theta, model.context_length, stretched

    assert rope("llama1-65b") == (1e4, 2048, None) and rope("llama2-70b") == (1e4, 4096, None)
    assert rope("codellama-7b") == rope("codellama-python-34b") == (1e4, 4096, None)
    assert rope("codellama-long-34b") == (1e6, 16_384, None)
    assert rope("llama3-70b") == rope("llama3.1-405b") == (5e5, 8192, None)
    assert rope("llama3.1-long-405b") == (5e5, 131_072, (8, 8192))
    assert rope("llama3.2-1b") == (5e5, 131_072, (32, 8192))
    assert rope("llama4-scout") == (5e5, 262_144, (16, 8192)) and rope("llama4-maverick") == (5e5, 262_144, None)


def test_the_405b_grows_its_batches_as_published(configs: Any) -> None:
    for name in ("llama3.1-8b", "llama3.1-70b", "llama3.1-405b"):
        base = configs(name)["base"]
        ramp = [(size.from_tokens, size.seq_len, size.seq_len * size.batch_size) for size in base.phases]
        assert ramp == [(252e6, 8192, 2**23), (2.87e12, 8192, M16)]
        assert base.train.schedule_steps == 1_200_000 > base.train.steps
        assert base.sizes().tokens_before(base.train.steps) == pytest.approx(15.6e12, abs=M16)
    long = configs("llama3.1-long-405b")["base"]
    assert [size.seq_len for size in long.phases] == [32_768, 65_536, 131_072]
    assert {size.seq_len * size.batch_size for size in (long.train, *long.phases)} == {M16}
    assert long.promote.needles == 1 and long.promote.short == 8192
    assert long.anneal.average and long.train.anneal * M16 == pytest.approx(40e6, rel=0.3)
    assert long.anneal.weights["annealing"] == 30 == 100 - sum(long.anneal.weights.values()) + 30


def test_the_small_ones_are_pruned_and_taught(configs: Any) -> None:
    for name in ("llama3.2-1b", "llama3.2-3b"):
        base = configs(name)["base"]
        assert base.init_from == "runs/llama3.1-long-8b" and base.adapt is not None
        assert base.distil.teachers == ("runs/llama3.1-long-8b", "runs/llama3.1-long-70b")
        assert base.model.tied_embeddings


# Ranks of Table 4, of the Llama 1 paper and, for Meditron, of 16 machines; of all others some that the layout must fit.
CLUSTERS = {
    "llama3.1-405b": (8192, {"tp": 8, "cp": 1, "pp": 16, "dp": 64}),
    "llama3.1-long-405b": (16_384, {"tp": 8, "cp": 16, "pp": 16, "dp": 8}),
    "llama1-65b": (2048, {"tp": 8, "cp": 1, "pp": 1, "dp": 256}),
    "meditron-70b": (128, {"tp": 8, "cp": 1, "pp": 8, "dp": 2}),
    "llama4-scout": (512, {"tp": 8, "cp": 1, "pp": 1, "dp": 64}),
    "llama4-maverick": (512, {"tp": 4, "cp": 1, "pp": 1, "dp": 128}),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_layout_fits_model_and_batches(name: str, configs: Any) -> None:
    base = configs(name)["base"]
    vocabulary = {"llama3": 128_256, "llama4": 202_048}.get(name[:6], 32_000 + 16 * ("codellama" in name))
    shape = base.model.to_llama(vocabulary)
    ranks, axes = CLUSTERS.get(name, (64, None))
    for size in (base.train, *base.phases):
        layout = base.train.parallel.check(shape, size.seq_len, size.batch_size, 1, ranks)
        assert axes is None or layout.axes() == axes


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_number_of_the_loop_says_where_it_is_from(file: Path) -> None:
    if file.stem in ("pocket", "pocket-long"):
        return
    text = file.read_text()
    legend = set(re.findall(r"\[(\w+)\] \S", text.split("\nname:")[0].replace("·", "·\n")))
    block = text[text.rindex("\n    train:\n") :].splitlines()[2:]
    assert block
    for line in block:
        tags = set(re.findall(r"\[(P|C|R|M|D|2|ours)\]", line.partition("#")[2]))
        assert tags, line
        assert tags <= legend, line


def test_text_that_is_not_there_and_runs_that_were_not_made_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(everything_at(tmp_path))
    run = tmp_path / "runs" / "llama2-7b"
    run.rename(tmp_path / "elsewhere")
    with pytest.raises(
        UsageError, match=r"codellama\.yaml: tokenizer: there is no such run yet.*herd run llama2-7b makes"
    ):
        place(load_recipe("codellama-7b"), stage_table(), "runs/x")
    place(
        load_recipe("codellama-7b", ["tokenizer.file=elsewhere", "base.init_from=elsewhere"]), stage_table(), "runs/x"
    )
    (tmp_path / "data" / "c4").rename(tmp_path / "c4")
    with pytest.raises(UsageError, match=r"llama1\.yaml: corpus: there is no such source; got data/c4"):
        place(load_recipe("llama1"), stage_table(), "runs/x")
