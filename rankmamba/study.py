"""Run the numbered notebooks at a scale, strictly: `python -m rankmamba.study --scale quick [--only 02,03] [-p name=value]`.

Strictly: a parameter that no notebook has, a missing record or a failing cell ends the run with a clear message and a non-zero
exit. The executed notebooks, records, runs, models and figures go to `results/<scale>/`.
"""

import argparse
import sys
import time
from pathlib import Path

import papermill
import yaml
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError

from .errors import InputError
from .files import write_text
from .results import read_records
from .tables import final_table, format_table

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
REPORT = "07_report"


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


def read_scale(name: str) -> dict:
    """Read `notebooks/scales/<name>.yaml`: {"parameters": {name: value}, "minutes": {notebook: minutes on 2 cores}}.

    Raises:
        InputError: there is no such scale, or its file is not such a mapping.
    """
    path = NOTEBOOKS / "scales" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise InputError(f"expected a scale among {known}, got {name!r}")
    try:
        scale = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"expected YAML in {path}, got: {error}") from error
    if (
        not isinstance(scale, dict)
        or set(scale) != {"parameters", "minutes"}
        or not all(isinstance(v, dict) for v in scale.values())
    ):
        raise InputError(f"expected the two mappings 'parameters' and 'minutes' in {path}, got {scale!r:.200}")
    return scale


def parse_parameters(assignments: list[str]) -> dict:
    """Parse ["name=value", ...]; values are read as YAML, so 3, 1e-3, true, [a, b] and text mean what they look like."""
    parameters = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"expected -p name=value, got {assignment!r}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"expected a value in YAML after {name}=, got {text!r}") from error
        try:
            value = float(value) if isinstance(value, str) else value  # YAML 1.1 reads 1e-3 as text
        except ValueError:
            pass
        parameters[name] = value
    return parameters


def assign(paths: list[Path], given: dict) -> dict[Path, dict]:
    """Give each notebook those of the parameters that it declares.

    Raises:
        InputError: a parameter is declared by none of them (papermill itself would only warn and run with the default).
    """
    declared = {path: set(papermill.inspect_notebook(path)) for path in paths}
    everything = set().union(*declared.values())
    unknown = sorted(set(given) - everything)
    if unknown:
        raise InputError(f"expected parameters among {', '.join(sorted(everything))}, got {', '.join(unknown)}")
    return {path: {name: value for name, value in given.items() if name in declared[path]} for path in paths}


def run(scale: str, only: str | None = None, overrides: dict | None = None, folder: Path | None = None) -> Path:
    """Execute the notebooks at a scale and return the results folder.

    Raises:
        InputError: an unknown scale, notebook or parameter, or a cell that failed; the executed copy up to there is kept.
    """
    settings = read_scale(scale)
    folder = (folder or ROOT / "results" / scale).resolve()
    paths = notebooks(only)
    every = notebooks()
    # The scale's parameters must fit the notebooks as a whole; what the user types must fit the ones that run.
    assign(every, settings["parameters"])
    given = {path: values for path, values in assign(every, settings["parameters"]).items() if path in paths}
    ours = {"scale": scale, "results": str(folder), "interactive": False}
    for extra in (assign(every, ours), assign(paths, overrides or {})):
        given = {path: values | extra[path] for path, values in given.items()}
    minutes = settings["minutes"]
    started = time.monotonic()
    (folder / "notebooks").mkdir(parents=True, exist_ok=True)
    for place, path in enumerate(paths, 1):
        elapsed, left = time.monotonic() - started, sum(minutes.get(later.stem, 0) for later in paths[place - 1 :])
        say(f"[{place}/{len(paths)}] {path.stem}  elapsed {clock(elapsed)}, remaining about {clock(60 * left)}")
        output = folder / "notebooks" / path.name
        try:
            papermill.execute_notebook(
                str(path),
                str(output),
                parameters=given[path],
                kernel_name="python3",
                cwd=str(NOTEBOOKS),
                progress_bar=False,
                stderr_file=sys.stderr,  # the progress bars of the cells
                coalesce_streams=True,  # of which the copy keeps the last state
                extra_arguments=["--IPKernelApp.log_level=40"],  # no warning that the local connection is not encrypted
            )
        except PapermillExecutionError as error:
            reason = f"{error.ename}: {error.evalue}" if error.ename != "InputError" else error.evalue
            raise InputError(
                f"{path.name} failed in cell {error.exec_count}: {reason}\n  the copy up to there: {output}"
            ) from error
        if path.stem == REPORT:
            export_report(output, folder / "report.html")
    say(f"done in {clock(time.monotonic() - started)}")
    return folder


def export_report(executed: Path, target: Path) -> None:
    """Write an executed notebook as one self-contained HTML file: its text, tables and figures, without the code."""
    exporter = HTMLExporter(template_name="classic", exclude_input=True, embed_images=True)
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    exporter.require_js_url = exporter.mathjax_url = exporter.jquery_url = ""
    body, _ = exporter.from_filename(str(executed))
    write_text(target, body)


def clock(seconds: float) -> str:
    """Write seconds as m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rankmamba.study", description=__doc__.split("\n")[0])
    parser.add_argument("--scale", default="quick", help="a file in notebooks/scales (default: quick)")
    parser.add_argument("--only", help="numbers of the notebooks to run, e.g. 02,03")
    parser.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE", help="override a parameter")
    parser.add_argument("--results", type=Path, help="where everything goes (default: results/<scale>)")
    options = parser.parse_args(arguments)
    try:
        folder = run(options.scale, options.only, parse_parameters(options.parameters), options.results)
        records = read_records(folder, "evaluate")
    except InputError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; finished records are kept, start the same command again")
        return 130
    if records:
        print(format_table(final_table(read_records(folder))))
    for name in ("report.html", "records", "notebooks"):
        if (folder / name).exists():
            print(f"{name}: {folder / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
