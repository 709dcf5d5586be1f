"""Run the numbered notebooks at a scale, strictly: `python -m rankmamba.study --scale quick [--only 02,03] [-p name=value]`.

Strictly: a parameter that no notebook has, a missing record or a failing cell ends the run with a clear message and a non-zero
exit status. The executed notebooks, records, runs, models and figures go to `results/<scale>/`. With `-f sweep.yaml` the same is done
for many sets of parameters (`sweep`).
"""

import argparse
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

from tqdm.std import tqdm

from .batch import plan
from .batch.parameters import NOTEBOOKS, ROOT, declared, notebooks, parse_parameters, read_scale, settle
from .data.sources import say
from .errors import InputError
from .files import alone, refusals, write_text
from .training.config import weights_in

REPORT = "07_report"
clock = tqdm.format_interval  # mm:ss, or h:mm:ss
# What the browser is told: nothing runs, and nothing is loaded from elsewhere.
REPORT_POLICY = (
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; font-src data:; style-src 'unsafe-inline'\">"
)
# The final table has eleven columns, which must fit the window and the printed page, where nothing scrolls.
REPORT_STYLE = """
div#notebook-container { width: auto; max-width: 1300px; padding: 2ex }
div.output_subarea { max-width: 100% }
.rendered_html table { font-size: 10px }
@media print {
  @page { size: A4; margin: 12mm }
  body, .rendered_html { font-size: 10pt }
  div#notebook-container { width: 100%; padding: 0; box-shadow: none }
  div.cell, div.output, div.output_area, div.output_wrapper { display: block; break-inside: auto; padding: 0 }
  div.output_subarea { max-width: 100%; overflow: visible }
  .rendered_html table { font-size: 6.5pt; width: 100%; table-layout: auto }
  .rendered_html th, .rendered_html td { padding: 1pt 2pt; white-space: normal; max-width: none }
  .rendered_html tr, .rendered_html img, .rendered_html svg { break-inside: avoid }
  .rendered_html h1, .rendered_html h2 { break-after: avoid; break-inside: avoid; margin-top: 8pt }
  pre { font-size: 7pt; white-space: pre-wrap; word-break: normal; overflow-wrap: anywhere }
  .rendered_html img, .rendered_html svg { max-height: 95mm; width: auto }
}
"""


def run(scale: str, only: str | None = None, overrides: dict | None = None, folder: Path | None = None) -> Path:
    """Execute the notebooks at a scale and return the results folder; leaves a record of kind "study" when all are done.

    Raises:
        InputError: a scale, notebook or parameter is unknown, the folder is the notebooks' own, or a cell failed; the executed copy up to
            that cell is kept.
    """
    from .results import check_collection

    settings, minutes, paths = settle(scale, only, overrides), read_scale(scale)["minutes"], notebooks(only)
    folder = (folder or ROOT / "results" / scale).resolve()
    if (folder / "notebooks").resolve() == NOTEBOOKS.resolve():
        raise InputError(f"expected a folder of its own for the results, got {folder}, where the notebooks themselves are")
    values = settings | {"scale": scale, "results": str(folder), "interactive": False}
    with refusals(folder):
        (folder / "notebooks").mkdir(parents=True, exist_ok=True)
    with alone(folder / ".lock", f"another study writes to {folder}; waiting for it"):
        if any("collection" in declared(path) for path in paths):
            check_collection(folder, settings["collection"])  # before an earlier executed copy is replaced
        started, planned = time.monotonic(), [60 * minutes.get(path.stem, 0) for path in paths]
        for place, path in enumerate(paths, 1):
            elapsed = time.monotonic() - started
            left = remaining(elapsed, planned[: place - 1], planned[place - 1 :])
            say(f"[{place}/{len(paths)}] {path.stem}  elapsed {clock(elapsed)}, remaining about {clock(left)}")
            output = folder / "notebooks" / path.name
            execute(path, output, {name: value for name, value in values.items() if name in declared(path)})
            if path.stem == REPORT:
                export_report(output, folder / "report.html")
        seconds = time.monotonic() - started
        leave_record(folder, scale, only, settings, seconds)
    say(f"done in {clock(seconds)}")
    return folder


def execute(notebook: Path, output: Path, parameters: dict) -> None:
    """Execute one notebook into `output`.

    Raises:
        InputError: a cell failed, its process died, or the disk is full; the copy up to that cell is kept.
    """
    import papermill  # here and below: mistakes in the arguments should be reported before these are loaded

    def interruptible(**_) -> None:
        """Let Ctrl-C raise here: the notebook client would catch it, stop the kernel and report a dead kernel."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        with refusals(output):
            # the kernel of this Python, and there this rankmamba, whatever else this user has installed
            os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
            others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", str(ROOT))]
            os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *others])
            papermill.execute_notebook(
                str(notebook),
                str(output),
                parameters=parameters,
                kernel_name="python3",
                cwd=str(NOTEBOOKS),
                progress_bar=False,
                stderr_file=sys.stderr,  # the progress bars of the cells
                coalesce_streams=True,  # the copy keeps only their last state
                extra_arguments=["--IPKernelApp.log_level=40"],  # no warning that the local connection is not encrypted
                on_notebook_start=interruptible,
                shutdown_kernel="immediate",  # it would wait for a busy kernel
            )
    except papermill.PapermillExecutionError as error:
        reason = f"{error.ename}: {error.evalue}" if error.ename != "InputError" else error.evalue
        raise InputError(
            f"{notebook.name} failed in cell {error.exec_count}: {reason}\n  the copy up to there: {output}"
        ) from error
    except RuntimeError as error:  # what the client raises when the kernel is gone
        if "before replying" in str(error):
            raise InputError(f"{notebook.name} did not begin: its Python process ended ({error}); see what it said above") from error
        raise InputError(
            f"{notebook.name} ended early: the Python process that ran it died ({error}); if the machine was out of memory, close "
            f"other programs or choose smaller batches, and start the same command again\n  the copy up to there: {output}"
        ) from error


def record_config(only: str | None, settings: dict) -> dict:
    """The `config` of a "study" record: which notebooks, with which parameters, on which of the user's own files and weights."""
    config = {"notebooks": [path.stem for path in notebooks(only)], "parameters": settings} | weights_in(settings.get("systems", []))
    collection = settings.get("collection")
    read = [] if collection is None else [f"{collection}/{part}" for part in ("train", "dev", "test")]
    read = [place for place in [*read, *settings.get("transfer_collections", [])] if Path(place).is_dir()]
    if not read:
        return config
    from .collection import digest_of  # slow to import

    return config | digest_of(read)


def leave_record(folder: Path, scale: str, only: str | None, settings: dict, seconds: float) -> None:
    """Leave the record of kind "study", by which a sweep knows that these notebooks ran to the end."""
    from . import results

    made = folder, "study", "study", settings.get("collection", ""), scale, settings.get("seed", 0)
    results.leave_record(*made, record_config(only, settings), {}, {"seconds": seconds})


def export_report(executed: Path, target: Path) -> None:
    """Write an executed notebook as one self-contained HTML file: its text, tables and figures, without the code and without scripts."""
    import nbformat
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="classic", exclude_input=True, embed_images=True)
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    notebook = nbformat.read(executed, as_version=4)
    notebook.metadata["title"] = notebook.cells[0].source.splitlines()[0].lstrip("# ")
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if "text/markdown" in output.get("data", {}):  # sentences with names from records, which may be another's
            output["data"]["text/markdown"] = output["data"]["text/markdown"].replace("<", "&lt;")
    body, _ = exporter.from_notebook_node(notebook)
    body = re.sub(r"<script\b.*?</script>", "", body, flags=re.DOTALL)  # they would ask servers elsewhere for more
    body = body.replace("<head>", f"<head>{REPORT_POLICY}", 1).replace("</head>", f"<style>{REPORT_STYLE}</style></head>", 1)
    write_text(target, body)


def remaining(elapsed: float, done: list[float], left: list[float]) -> float:
    """Estimate the seconds that are left: as planned, or longer where this machine has been slower so far. Never shorter: steps that an
    earlier run finished take no time and say nothing about the machine."""
    return sum(left) * (max(1.0, elapsed / sum(done)) if sum(done) else 1.0)


def show(folder: Path) -> None:
    """Print the final table of a study and where its files are."""
    from .reporting.tables import chosen_measure, final_table, format_table
    from .results import read_records

    records = read_records(folder)
    if any(record["kind"] == "evaluate" for record in records):
        print(format_table(final_table(records, chosen_measure(records))))
    for name in ("report.html", "records", "notebooks"):
        if (folder / name).exists():
            print(f"{name}: {folder / name}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rankmamba.study", description=__doc__.split("\n")[0])
    parser.add_argument("--scale", default="quick", help="a file in notebooks/scales (default: quick)")
    parser.add_argument("--only", help="numbers of the notebooks to run, e.g. 02,03")
    parser.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE", help="override a parameter")
    parser.add_argument("--results", type=Path, help="where everything goes (default: results/<scale>)")
    parser.add_argument("--dry-run", action="store_true", help="print what a study of the papers would fetch, run and take here")
    parser.add_argument("--yes", action="store_true", help="fetch gigabytes without asking")
    sweep = parser.add_argument_group("many sets of parameters")
    sweep.add_argument("-f", dest="sweep", type=Path, metavar="SWEEP.YAML", help="{name: [values]} or [{name: value}, ...]")
    sweep.add_argument("--jobs", type=int, help="how many sets run at once, sharing the threads (default: 1)")
    sweep.add_argument(
        "--submitit", nargs="*", metavar="NAME=VALUE", help="hand the sets to a Slurm cluster, e.g. timeout_min=60"
    )
    options = parser.parse_args(arguments)
    if options.sweep is None and (options.jobs is not None or options.submitit is not None):
        parser.error("--jobs and --submitit are for a sweep: name its file with -f")
    try:
        overrides = parse_parameters(options.parameters)
        if options.dry_run:
            print(plan.dry_run(options.scale, settle(options.scale, options.only, overrides), overrides))
            return 0
        plan.announce(settle(options.scale, options.only, overrides), options.yes)
        if options.sweep is not None:
            from .batch.sweep import run_sweep

            cluster = None if options.submitit is None else parse_parameters(options.submitit)
            return run_sweep(options.sweep, options.scale, options.only, overrides, options.results, options.jobs, cluster)
        show(run(options.scale, options.only, overrides, options.results))
    except InputError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; finished records are kept, start the same command again")
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill ends the studies of a sweep like Ctrl-C
    sys.exit(main())
