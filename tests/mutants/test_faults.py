"""The faults are what they claim to be: each operator does what its examples say, and a seed always draws the same."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from cosmic_ray.mutating import mutate_code
from tests.mutants.__main__ import ROOT, NoVerdict, check_without_fault
from tests.mutants.operators import DeleteStatement, ReplaceReturn, operators
from tests.mutants.rooms import ROOMS
from tests.mutants.sampling import mutated, places, sample


@pytest.mark.parametrize("operator", [DeleteStatement, ReplaceReturn])
def test_an_operator_does_what_its_examples_say(operator: type) -> None:
    for example in operator.examples():
        assert mutate_code(example.pre_mutation_code, operator(), example.occurrence) == example.post_mutation_code


def test_the_same_seed_draws_the_same_faults_and_another_seed_others() -> None:
    first, second, other = (sample(ROOMS, ROOT, 50, seed) for seed in (1, 1, 2))
    assert first == second != other
    assert [len(each) for each in first.values()] == [10] * len(ROOMS)
    assert {mutant.kind for each in first.values() for mutant in each} == set(operators())


def test_every_drawn_fault_changes_the_source_and_still_compiles() -> None:
    for each in sample(ROOMS, ROOT, 50, 3).values():
        for mutant in each:
            source = (ROOT / mutant.module).read_text("utf-8")
            assert ast.dump(ast.parse(mutated(mutant, source))) != ast.dump(ast.parse(source))


NEVER_EVALUATED = """\
from __future__ import annotations
if TYPE_CHECKING:
    x = 1 + 2
class Host(Protocol):
    def f(self) -> int: return 1
def f(a: A | B) -> C | D: ...
y: E | F
"""


def test_what_the_program_never_evaluates_is_no_place_for_a_fault() -> None:
    assert list(places(Path("x.py"), NEVER_EVALUATED, operators())) == []


def test_every_module_of_a_room_has_tests() -> None:
    for room in ROOMS:
        for module in room.modules(ROOT):
            assert any((ROOT / test).exists() for tests in room.tests(module, ROOT) for test in tests)


def test_tests_that_fail_without_a_fault_are_no_judges(tmp_path: Path) -> None:
    drawn = {name: mutants[:1] for name, mutants in sample(ROOMS, ROOT, 50, 4).items() if name == "catalog"}
    [mutant] = drawn["catalog"]
    folder = tmp_path / "tests/unit" / mutant.module.relative_to("service").parent
    folder.mkdir(parents=True)
    test = folder / "test_it.py"
    test.write_text("def test_it(): pass\n")
    check_without_fault(drawn, tmp_path)
    test.write_text("import no_such_module\n")
    with pytest.raises(NoVerdict, match="catalog"):
        check_without_fault(drawn, tmp_path)
