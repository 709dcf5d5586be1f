"""Mutation testing, by hand: change one thing in a module, run the module's own tests, and see whether they notice.

    python tests/mutate.py [NAME ...] [--sample 60] [--seed 0]

Every mutant runs in a fork of this process, which has the libraries imported already, so it costs the tests and not the imports.
Not mutated are annotations, docstrings, the wording of errors, and arguments that only check or show (strict=, tqdm).
"""

import argparse
import ast
import atexit
import copy
import functools
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path

import conftest  # the environment of every test, before torch is imported

# isort: split
import bm25s  # noqa: F401
import hypothesis
import ir_datasets  # noqa: F401
import ir_measures  # noqa: F401
import pytest
import scipy.stats  # noqa: F401
import torch
import transformers  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this tree, whichever one is installed
TESTS = {
    "scan/dispatch": ["test_scan.py"],
    "scan/native/mamba2_inner": ["test_scan.py"],
    "network/mixers": ["test_mixers.py", "test_states.py"],
    "inputs": ["test_inputs.py", "test_reranker.py"],
    "candidates": ["test_candidates.py"],
    "network/fused": ["test_fused.py"],
    "network/last_layer": ["test_backbones.py", "test_attention.py"],
    "network/native_attention": ["test_attention.py", "test_backbones.py"],
    "scan/native/attention": ["test_attention.py"],
    "scan/native/gelu": ["test_fused.py"],
    "evaluate": ["test_evaluate.py"],
    "interpolation": ["test_evaluate.py"],
    "states/__init__": ["test_states.py"],
    "pairwise": ["test_pairwise.py"],
    "reporting/tables": ["test_results.py"],
    "transfer": ["test_transfer.py"],
    "data/formats": ["test_collection.py"],
    "data/runs": ["test_collection.py"],
    "collection": ["test_collection.py"],
    "experiment": ["test_experiment.py"],
    "study_folder": ["test_experiment.py"],
}
EXAMPLES = 20  # of a hypothesis test at most: more of them would kill more mutants, at several times the cost
SWAPS = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult},
    **{ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.LShift: ast.RShift, ast.RShift: ast.LShift},
}
Change = tuple[ast.AST, str, Callable[[ast.AST], None]]  # a node of the tree, what is said of it, what is done to its copy


def changes(tree: ast.Module) -> Iterator[Change]:
    """Yield every mutation of a module."""
    for node in _mutable(tree):
        for field in ("op", "test"):
            value = getattr(node, field, None)
            if type(value) in SWAPS:
                yield node, f"{type(value).__name__} -> {SWAPS[type(value)].__name__}", _set(field, SWAPS[type(value)]())
        match node:
            case ast.Compare():
                for place, op in enumerate(node.ops):
                    yield node, f"{type(op).__name__} -> {SWAPS[type(op)].__name__}", _set_item("ops", place, SWAPS[type(op)]())
            case ast.Constant(value=bool() as value):
                yield node, f"{value} -> {not value}", _set("value", not value)
            case ast.Constant(value=int() | float() as value):
                yield node, f"{value} -> {value + 1}", _set("value", value + 1)
            case ast.Constant(value=str() as value):
                yield node, f"{value!r} -> {value + '~'!r}", _set("value", value + "~")
            case ast.If() | ast.While() | ast.IfExp():
                yield node, "negate the condition", _set("test", ast.UnaryOp(ast.Not(), node.test))
            case ast.comprehension(ifs=[_, *_]):
                yield node, "drop the filter", _set_item("ifs", 0, ast.Constant(True))
            case ast.UnaryOp(op=ast.Not() | ast.USub()):
                yield node, f"drop {type(node.op).__name__}", _set("op", ast.UAdd() if isinstance(node.op, ast.USub) else _Same())
            case ast.Return(value=ast.expr()):
                yield node, "return None", _set("value", ast.Constant(None))
            case ast.Raise() | ast.AugAssign() | ast.Expr(value=ast.Call()) | ast.Continue() | ast.Break():
                yield node, f"drop the {type(node).__name__.lower()}", _become_pass


def _mutable(node: ast.AST) -> Iterator[ast.AST]:
    """Walk the tree, leaving out what says nothing about behaviour."""
    yield node
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "type_comment") or (isinstance(node, ast.Raise) and field in ("exc", "cause")):
            continue
        for child in value if isinstance(value, list) else [value]:
            match child:
                case ast.Expr(value=ast.Constant()) | ast.JoinedStr() | ast.ImportFrom() | ast.Import():
                    pass  # docstrings, messages
                case ast.Call(func=ast.Name(id="tqdm")) | ast.keyword(arg="strict" | "show_progress" | "show_progress_bar"):
                    pass
                case ast.Assign(value=ast.BinOp(op=ast.BitOr())) if isinstance(node, ast.Module):
                    pass  # the name of a type
                case ast.AST():
                    yield from _mutable(child)


class _Same(ast.Not):
    """Stands for `not` that was dropped."""


def _set(field: str, value) -> Callable[[ast.AST], None]:
    return lambda node: setattr(node, field, value)


def _set_item(field: str, place: int, value) -> Callable[[ast.AST], None]:
    return lambda node: getattr(node, field).__setitem__(place, value)


def _become_pass(node: ast.AST) -> None:
    location = {name: getattr(node, name) for name in ("lineno", "col_offset", "end_lineno", "end_col_offset")}
    node.__class__ = ast.Pass
    node.__dict__ = location


class _DropSame(ast.NodeTransformer):
    def visit_UnaryOp(self, node):  # noqa: N802
        self.generic_visit(node)
        return node.operand if isinstance(node.op, _Same) else node


def mutant(tree: ast.Module, number: int) -> ast.Module:
    """Return a copy of the tree with its mutation `number`."""
    changed = copy.deepcopy(tree)
    node, _, change = list(changes(changed))[number]
    change(node)
    return ast.fix_missing_locations(_DropSame().visit(changed))


def passes(path: Path, tree: ast.Module, tests: list[str], limit: float) -> bool:
    """Run the tests with `tree` as the code of `path`, in a fork; longer than `limit` seconds is a failure."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 1), os.dup2(nothing, 2)
            load = SourceFileLoader.get_code

            def get_code(self, name):
                return compile(tree, self.path, "exec") if Path(self.path) == path else load(self, name)

            SourceFileLoader.get_code = get_code
            # conftest as it is: imported again it would name another folder than ir_datasets has read its paths from
            options = ["-x", "-q", "-p", "no:cacheprovider", "--noconftest", "--rootdir", str(ROOT)]
            status = int(pytest.main([*options, *(str(ROOT / "tests" / test) for test in tests)], plugins=[conftest]))
            atexit._run_exitfuncs()
        finally:
            os._exit(status)
    deadline = time.monotonic() + limit
    while (found := os.waitpid(process, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return False
        time.sleep(0.05)
    return found[1] == 0


def run(name: str, sample: int, seed: int) -> tuple[int, int]:
    """Test a module's mutants, or a sample of them: (killed, tested)."""
    path = ROOT / "rankmamba" / f"{name}.py"
    tree, lines = ast.parse(path.read_text()), path.read_text().splitlines()
    every = list(changes(tree))
    started = time.monotonic()
    if not passes(path, tree, TESTS[name], 600):
        sys.exit(f"the tests of {name} fail without any mutation")
    limit = 20 + 5 * (time.monotonic() - started)
    numbers = sorted(random.Random(seed).sample(range(len(every)), min(sample, len(every))))
    survivors = 0
    for number in numbers:
        node, what, _ = every[number]
        if passes(path, mutant(tree, number), TESTS[name], limit):
            survivors += 1
            line = (node.target if isinstance(node, ast.comprehension) else node).lineno
            print(f"  survived: {name}.py:{line} {what}:  {lines[line - 1].strip()}", flush=True)
    killed = len(numbers) - survivors
    print(f"{name}: {killed} of {len(numbers)} killed ({killed / len(numbers):.0%}); {len(every)} mutants in all", flush=True)
    return killed, len(numbers)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(TESTS), help=f"among {', '.join(TESTS)}")
    parser.add_argument("--sample", type=int, default=60, help="mutants of each module at most")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a fork has no threads but its own
    init = hypothesis.settings.__init__

    def fewer_examples(self, *arguments, max_examples=EXAMPLES, **options):
        init(self, *arguments, max_examples=min(EXAMPLES, max_examples), **options)

    hypothesis.settings.__init__ = fewer_examples
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile("mutants", phases=phases, derandomize=True, database=None)
    hypothesis.settings.load_profile("mutants")
    counts = [run(name, options.sample, options.seed) for name in options.names]
    killed, tested = (functools.reduce(int.__add__, column) for column in zip(*counts, strict=True))
    print(f"in all {killed} of {tested} killed ({killed / tested:.0%})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
