"""pyproject.toml, constraints.txt and environment.yml agree on what is to be installed, and doctor tells what is."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import rankmamba
from rankmamba import doctor

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base", "seaborn": "seaborn-base"}


def requirements(lines):
    """{canonical name: Requirement} of requirement lines; a comment or an editable path is none."""
    found = [Requirement(line.split("#")[0]) for line in lines if line.split("#")[0].strip() and not line.startswith("-")]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def conda_requirements():
    """The same of environment.yml, its pip part included; conda's single = is made == to parse it."""
    plain = [re.sub("(?<![<>=])=(?!=)", "==", line) for line in CONDA["dependencies"] if isinstance(line, str)]
    return requirements(plain + next(part["pip"] for part in CONDA["dependencies"] if isinstance(part, dict)))


@pytest.mark.parametrize("part", ["dependencies", "gpu", "hf", "lab", "test"])
def test_every_requirement_is_in_the_conda_environment_with_the_same_lower_bound(part):
    conda = conda_requirements()
    for name, requirement in requirements(PROJECT["dependencies"] if part == "dependencies" else EXTRAS[part]).items():
        there = conda.get(CONDA_NAMES.get(name, name))
        assert there is not None, f"environment.yml lacks {CONDA_NAMES.get(name, name)}"
        if name != "torch":  # conda-forge's three kernels share an older torch than the newest one that would do
            assert there.specifier == requirement.specifier, name


def test_the_conda_environment_has_one_torch_that_the_kernels_compile_against():
    conda = conda_requirements()
    assert "torch" not in conda and "2.14" not in conda["pytorch"].specifier and "2.10" in conda["pytorch"].specifier
    assert CONDA["channels"] == ["conda-forge", "nodefaults"]


def test_constraints_pin_one_tested_version_of_every_requirement_for_every_supported_python():
    wanted = requirements(PROJECT["dependencies"] + EXTRAS["lab"] + EXTRAS["test"] + EXTRAS["hf"])
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = [Requirement(line) for line in lines]
    for minor in range(11, 15):
        python = {"python_version": f"3.{minor}", "python_full_version": f"3.{minor}.9", "sys_platform": "linux"}
        chosen = [pin for pin in pins if pin.marker is None or pin.marker.evaluate(python)]
        versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in chosen}
        assert len(versions) == len(chosen), f"a package is pinned twice for Python 3.{minor}"
        for name, requirement in wanted.items():
            assert versions[name] in requirement.specifier, f"{name} for Python 3.{minor}"


def test_nothing_but_the_gpu_extra_asks_for_a_cuda_package():
    everything_else = PROJECT["dependencies"] + sum((lines for extra, lines in EXTRAS.items() if extra != "gpu"), [])
    assert not {"mamba-ssm", "causal-conv1d", "flash-attn", "triton"} & set(requirements(everything_else))


def test_a_package_without_its_repository_says_what_comes_with_it_and_how_to_get_it(tmp_path):
    shutil.copytree(ROOT / "rankmamba", tmp_path / "rankmamba", ignore=shutil.ignore_patterns("__pycache__"))
    program = """
from rankmamba import Reranker, study
from rankmamba.errors import InputError
study.main([])
try:
    Reranker.from_pretrained("nano-mamba")
except InputError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert all("repository, not with the installed package" in said for said in (ran.stdout, ran.stderr))


ON_A_CPU = """
import importlib, pkgutil, sys, traceback, types

tried = []

class Installed:  # as the real packages do: they import without a GPU, and fail when they are called
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mamba_ssm", "causal_conv1d", "flash_attn", "selective_scan_cuda", "causal_conv1d_cuda"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: self.fails if name[:2] != "__" else object.__getattribute__(module, name)
        return module

    def exec_module(self, module):
        importer = next(f for f in traceback.extract_stack()[-2::-1] if "importlib" not in f.filename)
        tried.extend([module.__name__] if "transformers" not in importer.filename else [])
        module.__path__ = []

    @staticmethod
    def fails(*arguments, **named):
        raise RuntimeError("Expected x.is_cuda() to be true")

sys.meta_path.insert(0, Installed())
import rankmamba
for module in pkgutil.walk_packages(rankmamba.__path__, "rankmamba."):
    if module.name not in ("rankmamba.scan.cuda", "rankmamba.scan.native._kernels"):  # what a GPU needs; no Python module
        importlib.import_module(module.name)
for system in ("tiny-bert", "tiny-opt", "tiny-t5"):
    rankmamba.Reranker.from_pretrained(system).predict([("a query", "a document")])
assert not tried, tried
for system in ("tiny-mamba", "tiny-mamba2", "tiny-hybrid"):  # transformers' own files do import the packages
    reranker = rankmamba.Reranker.from_pretrained(system)
    reranker.predict([("a query", "a document")])
    inputs = reranker.inputs
    pair = inputs.join(inputs.queries(["a query"])[0], inputs.documents(["a document"])[0])
    reranker.model.train()(**inputs.collate([pair])).logits.sum().backward()
"""


def test_no_module_and_no_system_imports_a_cuda_package_on_a_cpu_and_one_that_is_installed_breaks_nothing():
    ran = subprocess.run([sys.executable, "-c", ON_A_CPU], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_every_package_that_the_code_imports_is_a_declared_requirement():
    providers = importlib.metadata.packages_distributions()
    declared = set(requirements(PROJECT["dependencies"] + EXTRAS["hf"] + EXTRAS["cluster"] + EXTRAS["gpu"]))
    for path in sorted((ROOT / "rankmamba").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            for module in {name.split(".")[0] for name in modules} - sys.stdlib_module_names - {"rankmamba"}:
                names = {canonicalize_name(name) for name in providers.get(module, [module])}
                assert names & declared, f"{path.relative_to(ROOT)} imports {module}, which pyproject.toml does not name"


def test_doctor_gives_the_true_last_line_of_a_failing_import(tmp_path, monkeypatch):
    (tmp_path / "built_for_another_torch.py").write_text("raise ImportError('undefined symbol: _ZN3c104cuda9SetDeviceEi')")
    (tmp_path / "falls_over.py").write_text("import os; os.abort()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor.import_problem("built_for_another_torch") == "ImportError: undefined symbol: _ZN3c104cuda9SetDeviceEi"
    assert doctor.import_problem("falls_over") == "the import crashed with SIGABRT"
    assert doctor.import_problem("json") is None


def test_doctor_names_what_an_extra_lacks_and_what_is_too_old(monkeypatch):
    extras = {"gpu": ["torch<2", "no-such-thing>=3"], "lab": ["nor-this"], "test": ["pytest"]}
    lines = ["torch>=2.6"] + [f"{line}; extra == '{extra}'" for extra in extras for line in extras[extra]]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: lines)
    there = importlib.metadata.version("torch")
    assert doctor.missing("gpu") == [f"torch<2 (there is {there})", "no-such-thing>=3"]
    assert doctor.missing("lab") == ["nor-this"] and doctor.missing("test") == doctor.missing() == []


def test_everything_that_the_default_installation_brings_is_pinned_with_hashes_to_the_versions_of_the_constraints():
    lines = (ROOT / "requirements.txt").read_text().replace("\\\n", "").splitlines()
    pins = [line.split("--hash=") for line in lines if not line.startswith("#")]
    assert all(hashes and re.fullmatch("(sha256:[0-9a-f]{64} *)+", "".join(hashes)) for _, *hashes in pins)
    versions = {pin.split(";")[0].strip() for pin, *_ in pins}
    assert versions <= {line.split(";")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    needed = {canonicalize_name(name) for name, _ in doctor.licences()} - {"rankmamba", "torch"}
    assert needed <= {canonicalize_name(Requirement(version).name) for version in versions}


def test_every_dependency_states_a_licence():
    assert not [name for name, licence in doctor.licences() if "not stated" in licence]


def test_the_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == rankmamba.__version__ and citation["license"] == PROJECT["license"]
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2403.18276"


def test_the_kernels_build_with_a_compiler_that_refuses_gccs_own_flags(tmp_path):
    compiler = tmp_path / "clang++"
    compiler.write_text(
        'case " $* " in *" -fno-predictive-commoning "*) echo "clang: error: unknown argument" >&2; exit 1;; esac\n'
        'while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done\n'
    )
    build = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp"]
    subprocess.run(build, cwd=ROOT, env=os.environ | dict.fromkeys(("CC", "CXX"), f"sh {compiler}"), check=True)
    assert list((tmp_path / "lib").rglob("_kernels.so"))
    assert not ROOT.joinpath(*tmp_path.parts[1:]).exists()  # nothing of it lands in the sources
