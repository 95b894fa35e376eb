"""Exercises: true by a second interpreter, free of duplicates, disjoint between the splits, the same everywhere."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import subprocess
import sys
import time

import pytest

from herd.align import exercises
from herd.align.exercises import KINDS, Exercise, generate, normalise, run_program
from herd.errors import HerdError, UsageError

# The oracle: another interpreter runs each program as it stands and reports what it printed.
_ORACLE = """
import contextlib, io, json, sys
printed = []
for program in json.load(sys.stdin):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(program, "program", "exec"), {"__name__": "program"})
    printed.append(out.getvalue())
json.dump(printed, sys.stdout)
"""


@pytest.fixture(scope="module")
def train() -> list[Exercise]:
    return generate(seed=1, n=8000, split="train")


@pytest.fixture(scope="module")
def heldout() -> list[Exercise]:
    return generate(seed=2, n=2000, split="heldout")


def _run_elsewhere(programs: list[str]) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-I", "-c", _ORACLE], input=json.dumps(programs), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_every_answer_is_true(train: list[Exercise], heldout: list[Exercise]) -> None:
    proved = [one for one in train + heldout if one.proof != "none"]
    for one, printed in zip(proved, _run_elsewhere([one.program for one in proved]), strict=True):
        if one.proof == "prints":
            assert printed == one.answer + "\n", one
        else:
            assert one.answer in one.program and printed.splitlines()[-1] == "True", one


def test_small_talk_is_the_only_thing_without_a_program(train: list[Exercise]) -> None:
    unproved = {one.kind for one in train if one.proof == "none" or not one.program}
    assert unproved == {"small_talk", "my_name_is"}


def test_what_is_asked_about_stands_in_the_question(train: list[Exercise]) -> None:
    """The numbers and words of a program are those of its question (a slip would make a false exercise)."""
    for one in train:
        if one.proof != "prints" or one.kind in ("power", "total"):
            continue
        constants = [node.value for node in ast.walk(ast.parse(one.program)) if isinstance(node, ast.Constant)]
        # 0 and -1 stand for "first" and "last", "," and "" for words as well
        for value in constants:
            if isinstance(value, str) and value.isalpha() and len(value) > 1:
                assert value.lower() in one.question.lower(), one
            elif isinstance(value, int) and not isinstance(value, bool) and abs(value) > 1:
                assert str(value) in one.question, one


def test_no_question_twice(train: list[Exercise], heldout: list[Exercise]) -> None:
    for part in (train, heldout):
        assert len({normalise(one.question) for one in part}) == len(part)


def test_the_splits_share_neither_question_nor_code(train: list[Exercise], heldout: list[Exercise]) -> None:
    assert not {normalise(one.question) for one in train} & {normalise(one.question) for one in heldout}
    asked = [{_asked_about(one) for one in part if one.proof == "prints"} for part in (train, heldout)]
    assert len(asked[0]) > 5000 and len(asked[1]) > 1000
    assert not asked[0] & asked[1]
    written = [{one.answer for one in part if one.proof == "checks"} for part in (train, heldout)]
    assert not written[0] & written[1]


def _asked_about(one: Exercise) -> str:
    """The program without the print and repr that only say how the answer is shown."""
    tree = ast.parse(one.program)

    class Bare(ast.NodeTransformer):
        def visit_Call(self, node: ast.Call) -> ast.AST:
            self.generic_visit(node)
            shows = isinstance(node.func, ast.Name) and node.func.id in ("print", "repr") and len(node.args) == 1
            return node.args[0] if shows else node

    return ast.dump(Bare().visit(tree))


def test_every_kind_is_in_both_splits(train: list[Exercise], heldout: list[Exercise]) -> None:
    assert {one.kind for one in train} == {one.kind for one in heldout} == set(KINDS)
    shares = {level: sum(one.difficulty == level for one in train) / len(train) for level in ("easy", "medium", "hard")}
    assert all(share > 0.1 for share in shares.values()), shares


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_each_kind_has_enough_to_learn_from_and_to_test(kind: str) -> None:
    assert len(generate(3, 60, "train", kinds=[kind])) == 60
    assert len(generate(3, 6, "heldout", kinds=[kind])) == 6


def test_many_ways_to_ask(train: list[Exercise]) -> None:
    openings = {normalise(one.question).split("print")[0].split(" ")[0] for one in train}
    assert len(openings) > 40
    assert any(one.question[:1].islower() for one in train), "some questions are typed casually"
    assert sum("`" in one.question for one in train) > len(train) / 2


def test_values_are_written_as_python_writes_them_and_output_as_it_is_printed(train: list[Exercise]) -> None:
    """`"a".upper()` is 'A', and print shows A."""
    upper = [one for one in train if one.kind == "upper"]
    printed = [one for one in upper if "print" in one.question]
    values = [one for one in upper if ".upper()" in one.question and "print" not in one.question]
    assert printed and values and len(printed) + len(values) < len(upper), "all three forms occur"
    assert all(one.answer.isupper() and "'" not in one.answer for one in upper if one not in values)
    assert all(one.answer == repr(ast.literal_eval(one.answer)) for one in values)
    greetings = [one for one in train if one.kind == "greet"]
    for one in greetings:
        assert one.answer.startswith(("'", '"')) == ("```" not in one.question), one
    assert 0 < sum("```" in one.question for one in greetings) < len(greetings)


def test_answers_are_short(train: list[Exercise]) -> None:
    assert max(len(one.answer) for one in train) <= 64
    assert all(one.answer == one.answer.strip() and one.answer for one in train)


def test_a_pure_function_of_the_arguments() -> None:
    first = generate(5, 300, "train")
    assert first == generate(5, 300, "train")
    assert first[:100] == generate(5, 100, "train"), "a longer call begins with the shorter one's exercises"
    assert first != generate(6, 300, "train")


def test_the_same_in_every_process() -> None:
    code = "from herd.align.exercises import generate; import hashlib;"
    code += "print(hashlib.sha256(repr(generate(9, 1500, 'train')).encode()).hexdigest())"
    digests = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        digests.add(done.stdout.strip())
    assert digests == {hashlib.sha256(repr(generate(9, 1500, "train")).encode()).hexdigest()}


def test_fast_enough() -> None:
    """20,000 in 5 seconds, with room for a slow machine: 4,000 in 3 seconds of processor time."""
    start = time.process_time()
    generate(11, 4000, "train")
    assert time.process_time() - start < 3.0


def test_needs_no_torch() -> None:
    code = "import sys; import herd.align.exercises; import herd.evaluate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_wrong_arguments() -> None:
    with pytest.raises(UsageError, match="train, heldout"):
        generate(0, 1, "test")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="add_small"):
        generate(0, 1, "train", kinds=["add_smal"])
    with pytest.raises(UsageError, match=r"used up.*at most"):
        generate(0, 100_000, "heldout", kinds=["my_name_is"])


@pytest.mark.parametrize(
    "program",
    [
        "import os",
        "print(().__class__)",
        "print(__import__('os'))",
        "while True: pass",
        "open('x', 'w')",
        "print(eval('1'))",
        "class A: pass",
        "@print\ndef f(): pass",
        "print(1 / 0)",
        "print(",
    ],
)
def test_programs_outside_the_allow_list_do_not_run(program: str) -> None:
    with pytest.raises(HerdError):
        run_program(program)


def test_programs_print_as_python_does() -> None:
    assert run_program("print(1, 'a', sep='-', end='!')\nprint([1, 'b'])") == "1-a![1, 'b']"
    assert run_program("for i in range(2): print(i)") == "0\n1"


def test_normalise_and_split_are_stable() -> None:
    assert normalise("  What is `1 + 1`? ") == "what is 1 + 1"
    assert exercises.split_of("|1 + 1") == exercises.split_of("|1  + 1")
    held = sum(exercises.split_of(f"|{i}") == "heldout" for i in range(10_000))
    assert 850 < held < 1150  # one in ten
