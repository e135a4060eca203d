"""Each fault has the described effect, a seed always draws the same faults, and the right tests judge them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from cosmic_ray.mutating import mutate_code
from tests.mutants.__main__ import KILLED, ROOT, SURVIVED, UNREACHED, Runner, verdict
from tests.mutants.operators import DeleteStatement, ReplaceReturn, operators
from tests.mutants.rooms import ROOMS
from tests.mutants.sampling import Mutant, mutated, places, sample
from tests.mutants.selection import KnownTests, measure


@pytest.mark.parametrize("operator", [DeleteStatement, ReplaceReturn])
def test_an_operator_changes_its_examples_as_stated(operator: type) -> None:
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
z = 1e9
@dataclass(slots=True)
class Point: ...
"""


def test_code_that_the_program_never_evaluates_gets_no_fault() -> None:
    assert list(places(Path("x.py"), NEVER_EVALUATED, operators())) == []


STATEMENTS = """\
LIMIT = 1
def f(a,
      b=2):
    if (a
            and b == 3):
        g(
            4)
    return [x
            for x in a if x]
"""


def test_a_fault_knows_the_lines_of_its_statement_and_whether_a_call_runs_it() -> None:
    found = {
        (mutant.operator, mutant.line): (mutant.statement, mutant.in_function)
        for mutant in places(Path("x.py"), STATEMENTS, operators())
    }
    assert found["NumberReplacer", 1] == ((1,), False)
    assert found["NumberReplacer", 3][1] is False, "a default is evaluated at the import"
    assert found["ReplaceAndWithOr", 5] == ((4, 5), True)
    assert found["AddNot", 4] == ((4, 5), True)
    assert found["NumberReplacer", 7] == ((6, 7), True)
    assert found["DeleteStatement", 6] == ((6, 7), True)
    assert found["ReplaceReturn", 8] == ((8, 9), True)


MODULE = """\
LIMIT = 3
def allowed(number):
    if number < LIMIT:
        return True
    return False
def never():
    return 1
"""
TEST = """\
import module
def test_below(): assert module.allowed(2)
def test_at(): assert not module.allowed(3)
def test_elsewhere(): assert module.LIMIT
def test_broken(): assert False
"""


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    """A project of one module and its tests."""
    runner = Runner(tmp_path / "tree")
    (runner.tree / "service/grpc_h2/module.py").write_text(MODULE)
    (runner.tree / "tests/unit/test_module.py").write_text(TEST.replace("import", "from grpc_h2 import", 1))
    yield runner
    runner.close()


def test_a_fault_is_judged_by_the_tests_that_run_its_line(runner: Runner) -> None:
    known = KnownTests()
    measure(known, runner.tree, ["tests/unit/test_module.py"], jobs=1)
    assert list(known.failing) == ["tests/unit/test_module.py::test_broken"], "it can show nothing"

    def judged(mutant: Mutant) -> dict[str, object]:
        result = verdict(mutant, known, runner)
        return {"result": result["result"], "by": str(result["by"]).rpartition("::")[2], "tests": result["tests"]}

    module = Path("service/grpc_h2/module.py")
    found = {f"{mutant.operator}#{mutant.occurrence}": mutant for mutant in places(module, MODULE, operators())}
    assert judged(found["ReplaceComparisonOperator_Lt_LtE#0"]) == {"result": KILLED, "by": "test_at", "tests": 2}
    assert judged(found["ReplaceTrueWithFalse#0"]) == {"result": KILLED, "by": "test_below", "tests": 1}
    assert judged(found["NumberReplacer#0"])["result"] == KILLED, "a constant: all tests of the module"
    assert judged(found["NumberReplacer#2"]) == {"result": UNREACHED, "by": "", "tests": 0}
    for file in ("test_limits.py", "test_module.py"):
        name = f"tests/unit/grpc_h2/{file}::test_stated"
        known.seconds[name] = 0.001
        assert name in known.of(found["NumberReplacer#0"])[0], "it runs no line of the module, imported already"
        assert name not in str(known.of(found["NumberReplacer#2"]))
        del known.seconds[name]
    assert (runner.tree / module).read_text() == MODULE
    known.seconds.pop("tests/unit/test_module.py::test_at")
    assert judged(found["ReplaceComparisonOperator_Lt_LtE#0"])["result"] == SURVIVED
