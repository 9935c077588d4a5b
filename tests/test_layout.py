"""The repository's own rules: floors, names, links, sizes and what may be written where."""

from __future__ import annotations

import ast
import os
import re
import shutil
import statistics
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
FOLDERS = ("platform", "model", "jobs", "serve")
# Folder -> the folders it may import; the modules of src/insightedit stand above all of them.
FLOORS = {
    "model": {"model"},
    "platform": {"platform", "model"},
    "jobs": {"jobs", "platform", "model"},
    "serve": {"serve", "platform", "model"},
}
MODEL_MAY_IMPORT = {"torch", "transformers", "diffusers", "peft", "numpy", "PIL", "safetensors", "insightedit"}
LONGEST_FUNCTION = 80
MEDIAN_FUNCTION = 12
# Where packages come from is the choice of whoever installs: no file may name an index or a mirror of one.
REGISTRY = re.compile(r"index[-_]url|find[-_]links|://\S+/(?:simple|whl|wheels)\b|registry\s*=\s*http", re.IGNORECASE)
UNFINISHED = re.compile(r"\b(?:TODO|FIXME|XXX|HACK|NotImplementedError)\b")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".html", ".css", ".js", ".svg", ".sh", ""}


def own_files() -> list[Path]:
    """Every file of the project, relative to its root."""
    found = [Path(path.name) for path in ROOT.iterdir() if path.is_file()]
    for top in (*FOLDERS, "src", "tests", "benchmarks", "docs", "deploy", ".ci"):
        for parent, folders, files in os.walk(ROOT / top):
            folders[:] = [name for name in folders if name != "__pycache__" and not name.endswith(".egg-info")]
            found += [(Path(parent) / name).relative_to(ROOT) for name in files]
    return sorted(found)


def python_files(*folders: str) -> list[Path]:
    """Python files below the folders, relative to the root."""
    return [path for path in own_files() if path.suffix == ".py" and path.parts[0] in folders]


SOURCES = python_files(*FOLDERS, "src", "tests", "benchmarks")


def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> Iterator[str]:
    """Every absolute module name that a file imports, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            module = node.module or ""
            yield from (f"{module}.{alias.name}" for alias in node.names)


def forbidden(path: Path, name: str) -> bool:
    """Whether a file breaks a floor by importing this name."""
    folder, parts = path.parts[0], name.split(".")
    if folder == "model" and parts[0] not in MODEL_MAY_IMPORT | set(sys.stdlib_module_names):
        return True
    if parts[0] != "insightedit" or folder not in FLOORS:
        return False
    # What the package itself holds (its version) is for everybody; its modules are above all floors.
    above = {path.stem for path in python_files("src")} - {"__init__"}
    return len(parts) > 1 and (parts[1] in above or (parts[1] in FOLDERS and parts[1] not in FLOORS[folder]))


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_floors(path: Path) -> None:
    broken = [name for name in imported(parse(path)) if forbidden(path, name)]
    assert not broken, f"{path} may not import {', '.join(broken)}"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("model/unet.py", "ray"),
        ("model/unet.py", "insightedit.platform.errors"),
        ("platform/config.py", "insightedit.jobs.train"),
        ("jobs/train.py", "insightedit.serve.deployment"),
        ("serve/gateway.py", "insightedit.jobs.train"),
        ("jobs/train.py", "insightedit.cli.main"),
    ],
)
def test_floors_would_be_seen_broken(path: str, name: str) -> None:
    assert forbidden(Path(path), name)


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_own_modules_are_imported_through_insightedit(path: Path) -> None:
    for name in imported(parse(path)):
        first, _, rest = name.partition(".")
        assert first not in {"model", "jobs", "serve"}, f"{path}: import insightedit.{name}"
        own = (ROOT / "platform" / f"{rest.partition('.')[0]}.py").exists() if rest else False
        assert not (first == "platform" and own), f"{path}: import insightedit.{name}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_top_level_folders_are_no_packages(folder: str) -> None:
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists(), "a package named platform shadows the standard library's"


@pytest.mark.parametrize("folder", FOLDERS)
def test_links_are_relative(folder: str) -> None:
    link = ROOT / "src" / "insightedit" / folder
    assert link.is_symlink()
    assert str(link.readlink()) == f"../../{folder}"


def test_no_module_bears_a_name_of_the_standard_library() -> None:
    clashes = [path for path in python_files(*FOLDERS, "src", "tests") if path.stem in sys.stdlib_module_names]
    assert not clashes


def test_standard_library_works_from_the_root() -> None:
    command = "import platform, uuid; assert platform.system() and uuid.uuid4()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", command], cwd=ROOT, env=environment, check=True)


def function_lengths(paths: list[Path]) -> dict[str, int]:
    """Lines of every function with its docstring, by file, name and line."""
    lengths: dict[str, int] = {}
    for path in paths:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lengths[f"{path}:{node.lineno} {node.name}"] = (node.end_lineno or node.lineno) - node.lineno + 1
    return lengths


def test_functions_are_short() -> None:
    long = {name: lines for name, lines in function_lengths(SOURCES).items() if lines > LONGEST_FUNCTION}
    assert not long


def test_half_of_the_functions_are_very_short() -> None:
    lengths = function_lengths(python_files(*FOLDERS, "src"))
    assert statistics.median(lengths.values()) <= MEDIAN_FUNCTION


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_code_is_plain_and_finished(path: Path) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    assert text.isascii(), [line for line in text.splitlines() if not line.isascii()][:3]
    if path != Path(__file__).relative_to(ROOT):
        assert not UNFINISHED.search(text)


@pytest.mark.parametrize("path", [path for path in own_files() if path.suffix in TEXT_SUFFIXES], ids=str)
def test_no_file_names_a_package_registry(path: Path) -> None:
    if path == Path(__file__).relative_to(ROOT):
        pytest.skip("holds examples of what it looks for")
    found = REGISTRY.search((ROOT / path).read_text(encoding="utf-8"))
    assert not found, f"{path} names {found and found.group()}"


@pytest.mark.parametrize(
    "line", ["--extra-index-url https://a.b/c", "https://a.b/simple/torch", "registry=https://a.b"]
)
def test_a_named_registry_would_be_seen(line: str) -> None:
    assert REGISTRY.search(line)


def constraints() -> dict[str, str]:
    """Exact version of every constrained package, by its normalised name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(not pin.url and len(pin.specifier) == 1 and str(pin.specifier).startswith("==") for pin in pins)
    return {normalised(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_lie_within_the_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"]["dev"]]
    exact = constraints()
    for requirement in wanted:
        assert requirement.specifier, f"{requirement} has no range"
        assert requirement.specifier.contains(exact[normalised(requirement.name)]), str(requirement)


def test_what_is_imported_is_declared() -> None:
    """Nothing is used only because something else happens to install it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # What an extra brings is imported only where its user asks for it.
    lines = project["dependencies"] + project["optional-dependencies"]["redis"]
    declared = {normalised(Requirement(line).name) for line in lines}
    providers = packages_distributions()
    used = {name.partition(".")[0] for path in python_files(*FOLDERS, "src") for name in imported(parse(path))}
    for module in used - set(sys.stdlib_module_names) - {"insightedit"}:
        names = {normalised(name) for name in providers.get(module, [module])}
        assert names & declared, f"{module} is imported, and no dependency in pyproject.toml brings it"


def test_wheel_holds_what_is_behind_the_links(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in (*FOLDERS, "src"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("insightedit-*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("insightedit/")}
    expected = {f"insightedit/{path.as_posix()}" for path in own_files() if path.parts[0] in FOLDERS}
    expected |= {f"insightedit/{path.name}" for path in own_files() if path.parts[:2] == ("src", "insightedit")}
    assert packed == expected
