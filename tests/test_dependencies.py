"""The dependency rule, read from the imports of every file: wherever they stand, also inside functions.

    errors <- types <- nn, graph, program, ... , solve <- methods | runtimes <- top level

No method imports a method or a runtime; no runtime imports a runtime or a method. They meet in `nn` and
`program`.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tightrope

SOURCE = Path(tightrope.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# What each lower unit may import from the package, besides itself. Units not named are the top level,
# which may import everything.
LOWER: dict[str, set[str]] = {
    "errors": set(),
    "forms": set(),
    "types": {"errors", "forms"},
    "shard": {"errors"},
    "nn": {"errors", "types"},
    "ops": {"types"},
    "program": {"errors", "forms", "ops", "types"},
    "solve": {"errors", "types"},
    "data": {"errors", "forms", "types"},
    "checkpoint": {"errors", "forms", "types"},
    "kept": {"errors", "types"},
    "evaluate": {"errors", "data"},
    "models": {"errors", "types"},
    "graph": {"errors", "types", "nn"},
    "place": {"errors", "types", "nn", "graph"},
    "lower": {"errors", "types", "nn", "graph", "program"},
    "export": {"errors", "program"},
    "engine": {"errors", "export", "program", "types"},
    "recipe": {"errors"},
    "hints": {"errors", "nn", "graph"},
    "reach": {"nn", "evaluate"},
    "training": {"errors", "nn", "checkpoint", "hints", "reach", "recipe"},
    "finetune": {
        "errors",
        "types",
        "data",
        "shard",
        "place",
        "evaluate",
        "checkpoint",
        "recipe",
        "hints",
        "reach",
        "training",
    },
}
CORE = set(LOWER)
# `methods` and `runtimes` alone are the interfaces and tables of the folders below them.
LOWER |= {"methods": CORE, "runtimes": CORE}
# What a method's or a runtime's folder may import, besides itself.
FOLDERS = {"methods": CORE | {"methods"}, "runtimes": CORE | {"runtimes"}}

# Libraries that a unit may not import: these parts run where no network is.
WITHOUT: dict[str, set[str]] = {
    "errors": {"torch", "numpy", "scipy", "numba"},
    "forms": {"torch", "numpy", "scipy", "numba"},
    "types": {"torch", "scipy", "numba"},
    "ops": {"torch"},
    "program": {"torch"},
    "export": {"torch"},
    "solve": {"torch"},
}

PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
RUNS_CODE = {"eval", "exec", "compile", "__import__"}  # as bare names; `model.eval()` is something else
TORCH_PICKLES = {"load", "save"}  # as `torch.NAME`


def unit(module: str) -> str:
    """`tightrope.solve.mckp` -> `solve`; methods and runtimes by folder: `methods.block_relu`."""
    parts = module.split(".")[1:]
    return ".".join(parts[:2] if parts[0] in ("methods", "runtimes") else parts[:1])


def unit_of(path: Path) -> str:
    parts = [p for p in path.relative_to(SOURCE).with_suffix("").parts if p != "__init__"]
    return unit(".".join(["tightrope", *parts])) if parts else "tightrope"


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Every imported module by its full name; `from a import b` gives `a.b` where that is a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            for alias in node.names:
                inner = SOURCE.parent.joinpath(*base.split("."), alias.name)
                if inner.is_dir() or inner.with_suffix(".py").is_file():
                    yield f"{base}.{alias.name}"


def may_import(importer: str) -> set[str] | None:
    """The units of the package that `importer` may import; None: all of them."""
    folder = importer.split(".")[0]
    if importer in LOWER:
        return LOWER[importer] | {importer}
    return FOLDERS[folder] | {importer} if folder in FOLDERS else None


def forbidden(importer: str, tree: ast.AST, package: str) -> list[str]:
    """What a file of the unit `importer` imports against the rule."""
    allowed = may_import(importer)
    found = []
    for module in imports(tree, package):
        library = module.split(".")[0]
        inside = library == "tightrope" and module != "tightrope"
        if library in WITHOUT.get(importer, set()):
            found.append(module)
        if inside and allowed is not None and unit(module) not in allowed:
            found.append(module)
    return found


def unsafe(tree: ast.AST) -> list[str]:
    """Ways to run code out of a file."""
    found = []
    for module in imports(tree, "tightrope"):
        if module.split(".")[0] in PICKLES:
            found.append(module)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            if call in RUNS_CODE or call in {f"torch.{name}" for name in TORCH_PICKLES}:
                found.append(call)
            for keyword in node.keywords:
                if keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False":
                    found.append("allow_pickle")
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += [alias.name for alias in node.names if alias.name in TORCH_PICKLES]
    return found


def test_the_files_are_found():
    assert len(FILES) > 30
    units = {unit_of(path) for path in FILES}
    assert units >= CORE | {"methods", "methods.block_relu", "runtimes", "runtimes.plain", "tightrope", "cli"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_each_file_keeps_the_rules(path):
    text = path.read_text()
    tree = ast.parse(text)
    package = ".".join(("tightrope", *path.relative_to(SOURCE).parent.parts))
    assert forbidden(unit_of(path), tree, package) == []
    assert unsafe(tree) == []
    assert len(text.splitlines()) <= 400


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("errors", "import numpy"),
        ("errors", "from tightrope.types import Cost"),
        ("types", "import torch"),
        ("types", "from tightrope import graph"),
        ("solve", "def f():\n    import torch.nn"),
        ("solve", "from tightrope.nn import BlockReLU"),
        ("program", "from torch import Tensor"),
        ("nn", "from tightrope.graph import trace"),
        ("graph", "from tightrope.methods import Method"),
        ("lower", "from tightrope.runtimes.plain import evaluate"),
        ("methods", "from tightrope.methods.block_relu import BlockReluMethod"),
        ("methods.block_relu", "from tightrope.methods.paf import Paf"),
        ("methods.block_relu", "from tightrope.runtimes import runtime_type"),
        ("methods.block_relu", "import tightrope.runtimes.plain"),
        ("methods.block_relu", "from tightrope.bundle import Bundle"),
        ("runtimes", "from tightrope.methods import Method"),
        ("runtimes.mpc", "from tightrope.runtimes.plain import evaluate"),
        ("runtimes.mpc", "from ..plain import evaluate"),
        ("runtimes.mpc", "from tightrope.methods.block_relu.patches import label"),
        ("runtimes.plain", "from tightrope import pipeline"),
    ],
)
def test_the_rule_sees_what_breaks_it(importer, line):
    folder = "tightrope." + importer if "." in importer else "tightrope"
    assert forbidden(importer, ast.parse(line), folder)


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("graph", "from tightrope.nn import BlockReLU"),
        ("methods.block_relu", "from tightrope.methods import Progress"),
        ("methods.block_relu", "from tightrope.methods.block_relu.patches import label"),
        ("runtimes.mpc", "from tightrope.runtimes.mpc import fss"),
        ("pipeline", "from tightrope.runtimes.plain import ranges"),
        ("solve", "import numpy"),
    ],
)
def test_the_rule_lets_pass_what_keeps_it(importer, line):
    assert forbidden(importer, ast.parse(line), "tightrope") == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import joblib",
        "torch.load(path)",
        "torch.save(x, path)",
        "from torch import load",
        "eval('1')",
        "exec(text)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_unsafe_code_is_seen(line):
    assert unsafe(ast.parse(line))


def test_safe_code_is_not_called_unsafe():
    lines = "model.eval()\nload_file(path)\nnp.load(path, allow_pickle=False)\nre.compile('a')"
    assert unsafe(ast.parse(lines)) == []


def test_the_nouns_and_the_solvers_load_without_torch():
    """Also through what they import in turn."""
    program = (
        "import sys, tightrope.types, tightrope.program, tightrope.solve.select\n"
        "print(sorted({'torch', 'lightning_fabric', 'plotly'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
