"""The parameters of a study: declared by the notebooks, set by a scale, `-p` and a sweep, checked by name and type."""

import ast
import json
import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import yaml

from ..errors import InputError

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
# these may name folders, which are relative to where the command runs
PLACES = ("collection", "transfer_collections", "systems", "profile_systems", "learning_rates", "max_steps", "gpu_results")
AT_LEAST_ONE = ("n_dev", "n_test", "n_transfer", "n_state_queries", "top_k", "max_passages")
BATCH = ("scale", "results", "interactive")  # set by a batch run itself
TYPES = {"bool": bool, "int": int, "float": (int, float), "str": str, "list": list, "dict": dict}


class Loader(yaml.SafeLoader):
    """YAML limited to what JSON can hold, where a value is what it looks like: 1e-3 is a number, no is a word, a key occurs once."""

    yaml_implicit_resolvers = {}
    yaml_constructors = {
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
    }

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, f"the reference *{event.anchor}", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for place, key in enumerate(keys):
            if not isinstance(key, str) or key in keys[:place]:
                problem = f"the key {key!r}, which " + ("comes twice" if key in keys[:place] else "is not text")
                raise yaml.constructor.ConstructorError(None, None, problem, node.value[place][0].start_mark)
        return super().construct_mapping(node, deep=deep)

    def construct_finite(self, node):
        value = self.construct_yaml_float(node)
        if not math.isfinite(value):
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value[:20]}, which is not a finite number", node.start_mark
            )
        return value


Loader.add_constructor("tag:yaml.org,2002:float", Loader.construct_finite)
for _tag, _pattern, _first in [
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)", "-+.0123456789"),
]:
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def parse_yaml(text: str, where: str | Path) -> tuple[yaml.Node, Loader]:
    """Parse YAML: its root node, which knows its lines, and the loader that makes nodes into values (`construct_object`).

    Raises:
        InputError: it is empty or not the YAML of `Loader`; the message names `where` and the line.
    """
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is not None:
            loader.construct_object(node, deep=True)  # a node that cannot become a value fails here
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"expected YAML, got {error.problem} ({where}{line})") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"expected YAML, got {str(error).splitlines()[0]} ({where})") from error
    if node is None:
        raise InputError(f"expected YAML, got nothing ({where})")
    return node, loader


def load_yaml(text: str, where: str | Path):
    """Read YAML as plain values.

    Raises:
        InputError: as in `parse_yaml`.
    """
    node, loader = parse_yaml(text, where)
    return loader.construct_object(node, deep=True)


def yaml_text(path: Path) -> str:
    """The text of a YAML file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"expected a readable YAML file, got {path}: {error}") from error


def notebooks(only: str | None = None) -> list[Path]:
    """Return the numbered notebooks in order; `only` picks some by their numbers, e.g. "02,03".

    Raises:
        InputError: `only` names a number that no notebook has.
    """
    found = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    if only is None:
        return found
    wanted = [number.strip() for number in only.split(",")]
    numbers = [path.name[:2] for path in found]
    for number in wanted:
        if number not in numbers:
            raise InputError(f"expected notebook numbers among {', '.join(numbers)}, got {number!r} in --only {only}")
    return [path for path in found if path.name[:2] in wanted]


def scale_path(name: str) -> Path:
    return NOTEBOOKS / "scales" / f"{name}.yaml"


def read_scale(name: str) -> dict:
    """Read `notebooks/scales/<name>.yaml`: {"parameters": {name: value}, "minutes": {notebook: minutes on 2 cores}}.

    Raises:
        InputError: there is no such scale, its file is not such a mapping, or there are no scales, as in an installed package.
    """
    path = scale_path(name)
    known = sorted(file.stem for file in path.parent.glob("*.yaml"))
    if not known:
        raise InputError(
            f"expected the notebooks of the study and their scales in {NOTEBOOKS}, found none; they come with the repository, "
            "not with the installed package: run `pip install --editable .` in a clone"
        )
    if name not in known:
        raise InputError(f"expected a scale among {', '.join(known)}, got {name!r}")
    scale = load_yaml(yaml_text(path), path)
    parts = isinstance(scale, dict) and set(scale) == {"parameters", "minutes"}
    if not parts or not all(isinstance(part, dict) for part in scale.values()):
        raise InputError(f"expected the two mappings 'parameters' and 'minutes' in {path}, got {scale!r:.200}")
    return scale


def parse_parameters(assignments: list[str]) -> dict:
    """Parse ["name=value", ...]; values are YAML, so 3, 1e-3, true, [a, b] and text mean what they look like."""
    parameters = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"expected -p name=value, got {assignment!r}")
        parameters[name] = load_yaml(text, f"-p {assignment}")
    return parameters


@cache
def declared(notebook: Path) -> dict[str, tuple[str, object]]:
    """Read the cell tagged `parameters` of a notebook: {name: (type, default)} of its annotated literals.

    papermill has such a function, but takes two seconds to import, and a wrong argument should be reported at once.
    """
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    source = "".join(next(cell["source"] for cell in cells if "parameters" in cell["metadata"].get("tags", [])))
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.AnnAssign)]
    return {node.target.id: (ast.unparse(node.annotation), ast.literal_eval(node.value)) for node in nodes}


def known(paths: list[Path]) -> dict[str, tuple[str, object]]:
    """Return the parameters that can be given to these notebooks: {name: (type, default)}."""
    merged = {name: parameter for path in paths for name, parameter in declared(path).items()}
    return {name: parameter for name, parameter in merged.items() if name not in BATCH}


def check(name: str, value: object, known: Mapping[str, tuple[str, object]], where: str | Path) -> None:
    """Check a parameter's name and its value's type against those `known`.

    Raises:
        InputError: no notebook has it (papermill itself would only warn and run with the default), or its type is wrong.
    """
    if name not in known:
        raise InputError(f"expected parameters among {', '.join(sorted(known))}, got {name} ({where})")
    expected = known[name][0]
    kind = TYPES.get(expected, object)
    if not isinstance(value, kind) or isinstance(value, bool) and kind not in (bool, object):
        raise InputError(f"expected a value of type {expected} for {name}, got {value!r:.80} ({where})")


def settle(scale: str, only: str | None = None, overrides: dict | None = None) -> dict:
    """Return the parameters in effect: the notebooks' defaults, replaced by the scale's, replaced by the overrides.

    Raises:
        InputError: a scale, notebook or parameter is unknown, or a value is of the wrong type or out of range.
    """
    from_scale, overrides, paths = read_scale(scale)["parameters"], overrides or {}, notebooks(only)
    everywhere = known(notebooks())
    # The scale's parameters must fit the notebooks as a whole; what the user types must fit the ones that run.
    for given, fits, where in ((from_scale, everywhere, scale_path(scale)), (overrides, known(paths), "-p")):
        for name, value in given.items():
            check(name, value, fits, where)
    overrides = {name: _placed(value) if name in PLACES else value for name, value in overrides.items()}
    settings = {name: default for name, (_, default) in everywhere.items()} | from_scale | overrides
    _check_ranges(settings, overrides)
    return settings


def _placed(value):
    """Make paths of folders absolute, also in lists and as keys: the notebooks run in another folder.

    Where a collection's id or a system has the same name, that one is meant.
    """
    if isinstance(value, list):
        return [_placed(each) for each in value]
    if isinstance(value, dict):
        return {_placed(name): each for name, each in value.items()}
    if not isinstance(value, str) or not Path(value).is_dir():
        return value
    from ..collection import is_id  # slow to import
    from ..systems import SYSTEMS

    return value if value in SYSTEMS or is_id(value) else str(Path(value).resolve())


def _check_ranges(settings: Mapping, overrides: Mapping) -> None:
    """Check what would otherwise fail minutes into a study, by the ranges of a training's settings."""
    from ..training.config import RANGES, check_range  # it imports this module

    systems = settings.get("systems", ["any"])
    if not systems:
        raise InputError("expected at least one system, got systems=[]")
    for system in systems:
        if not isinstance(system, str):
            raise InputError(f"expected names of systems, got {system!r} in systems={systems}")
    for name in AT_LEAST_ONE:
        if settings.get(name, 1) < 1:
            raise InputError(f"expected {name} of at least 1, got {settings[name]}")
    if settings.get("first_stage", "bm25") not in ("bm25", "given"):
        raise InputError(f"expected bm25 or given as first_stage, got {settings['first_stage']!r}")
    if "measure" in overrides:
        from ..evaluate import MEASURES  # slow to import

        if overrides["measure"] not in MEASURES:
            raise InputError(f"expected a measure among {', '.join(MEASURES)}, got {overrides['measure']!r}")
    by_system = {"learning_rate": "learning_rates", "max_steps": "max_steps"}
    for name in RANGES:
        given = settings.get(by_system.get(name, name), {})
        for value in given.values() if isinstance(given, dict) else [given]:
            check_range(name, value)
    for name in by_system.values():
        unknown = [system for system in overrides.get(name, {}) if system not in ("default", *systems)]
        if unknown:
            raise InputError(f"expected systems among default, {', '.join(systems)} in {name}, got {unknown[0]}")
        if "default" not in settings.get(name, ["default"]):
            raise InputError(f"expected a value for default in {name}, got {settings[name]}")
