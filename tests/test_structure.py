"""The house rules that can be read off the source: who imports whom, what is never loaded, what every name
says."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.test_mutations import MUTATIONS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megawan"
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = MODULES + sorted((ROOT / "tools").rglob("*.py"))
EVERYONE_MAY_READ = ("megawan.rng", "megawan.cost", "megawan.hardware", "megawan")

# Room -> (the rooms of ours it may import besides itself, the other packages it may import or None for any).
STANDARD = frozenset(sys.stdlib_module_names)
ROOMS: dict[str, tuple[tuple[str, ...], frozenset[str] | None]] = {
    "megawan.flow": ((), frozenset({"torch", "einops"})),
    "megawan.parallel": ((), frozenset({"torch", "einops"})),
    "megawan.models": (
        ("megawan.parallel", "megawan.files"),
        frozenset({"torch", "einops", "safetensors", "flash_attn"}),
    ),
    "megawan.data": (
        ("megawan.files",),
        frozenset({"numpy", "torch", "safetensors", "av", "tqdm", "PIL", "einops"}),
    ),
    "megawan.encoders": (("megawan.data",), None),
    "megawan.cost": ((), frozenset()),
    "megawan.hardware": ((), frozenset()),
    "megawan.rng": ((), frozenset({"torch"})),
    "megawan.files": ((), frozenset({"torch", "safetensors"})),
    "megawan.cli": ((), frozenset({"tyro"})),
}

UNSAFE = {
    r"weights_only\s*=\s*False": "torch.load of code; use safetensors or weights_only=True",
    r"\bpickle\.(load|loads|Unpickler)\b|\b(import|from) pickle\b": "a pickle runs code when it is read",
    r"\byaml\.(load|unsafe_load|full_load)\b": "use json",
    r"(?<![.\w])(eval|exec)\(": "never run text",
    r"\bos\.(system|popen)\b|shell\s*=\s*True": "call subprocess with a list of words",
    r"\btrust_remote_code\s*=\s*True": "never run a downloaded model's code",
    r"\btorch\.load\((?!.*weights_only\s*=\s*True)": "torch.load needs weights_only=True",
}

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """Return every module that `source` imports, anywhere in it, relative ones resolved against `module`.

    `from megawan import flow` and `from megawan.flow import loss` name both the package and what is taken
    from it.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".") + ["__init__"] * is_package
                base = ".".join([*parts[: -node.level], *([base] if base else [])])
            found.update({base, *(f"{base}.{alias.name}" for alias in node.names)})
    return found


def in_room(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def complaints_about_imports(module: str, imported: set[str]) -> list[str]:
    """Return what `module` imports against the rules of its room and of the whole house."""
    wrong = []
    ours = {name for name in imported if in_room(name, "megawan")}
    others = {name.partition(".")[0] for name in imported - ours} - STANDARD - {""}
    if "deepspeed" in others and module != "megawan.engine":
        wrong.append(f"{module} imports deepspeed; only megawan.engine may")
    if any(in_room(name, "megawan.train") for name in ours) and module != "megawan.train":
        wrong.append(f"{module} imports megawan.train; nothing may")
    if "tools" in others and in_room(module, "megawan"):
        wrong.append(f"{module} imports tools; tools import megawan, never the other way")
    if module == "megawan.config" and "megawan.engine" in ours:
        wrong.append("megawan.config imports megawan.engine; reading flags needs no DeepSpeed")
    if any(in_room(name, "megawan.cli") for name in ours) and any(
        in_room(module, f"megawan.{room}") for room in ("flow", "models", "parallel", "data", "encoders")
    ):
        wrong.append(f"{module} imports megawan.cli; library code raises ValueError")
    for room, (rooms, packages) in ROOMS.items():
        if not in_room(module, room):
            continue
        for name in sorted(ours):
            if name not in EVERYONE_MAY_READ and not any(
                in_room(name, legal) for legal in (room, *rooms, *EVERYONE_MAY_READ[:-1])
            ):
                wrong.append(
                    f"{module} imports {name}; {room} may import {', '.join(rooms) or 'none of ours'}"
                )
        if packages is not None:
            wrong.extend(f"{module} imports {name}; {room} may not" for name in sorted(others - packages))
    return wrong


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_who_may_import_whom(path: Path) -> None:
    module = module_name(path)
    found = imports(path.read_text("utf-8"), module, path.name == "__init__.py")
    assert not complaints_about_imports(module, found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("megawan.flow.loss", "from megawan.models import wan"),
        ("megawan.flow.loss", "import numpy"),
        ("megawan.flow.loss", "from .. import models"),
        ("megawan.flow.loss", "from ..parallel import context"),
        ("megawan.models.wan", "from megawan.flow.loss import flow_loss"),
        ("megawan.models.wan", "def late():\n    import megawan.data.batch"),
        ("megawan.parallel.ring", "from megawan.models.attention import select_attention"),
        ("megawan.parallel.ring", "import deepspeed.comm"),
        ("megawan.data.batch", "from megawan import parallel"),
        ("megawan.data.batch", "from megawan.flow.schedule import FlowMatchScheduler"),
        ("megawan.cost", "import torch"),
        ("megawan.cost", "from megawan.models.variants import VARIANTS"),
        ("megawan.config", "from megawan.engine import initialize"),
        ("megawan.dist", "import deepspeed"),
        ("megawan.metrics", "from megawan.train import main"),
        ("megawan.metrics", "from tools import sample"),
        ("tools.sample", "import megawan.train"),
        ("megawan.models.layouts", "from megawan.cli import UserError"),
    ],
)
def test_a_forbidden_import_is_noticed(module: str, source: str) -> None:
    assert complaints_about_imports(module, imports(source, module))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "megawan.flow.loss",
            "import math\nimport torch\nfrom megawan.flow.schedule import x\nfrom megawan import rng",
        ),
        ("megawan.flow.loss", "from .schedule import FlowMatchScheduler"),
        ("megawan.models.wan", "from megawan.parallel.context import ContextParallel"),
        ("megawan.engine", "import deepspeed"),
        ("megawan.train", "from megawan import engine, config"),
    ],
)
def test_a_legal_import_passes(module: str, source: str) -> None:
    assert not complaints_about_imports(module, imports(source, module))


def test_no_module_hides_one_of_the_standard_library() -> None:
    # `python megawan/train.py` puts megawan/ first on sys.path: a megawan/random.py would be everybody's
    # `random`.
    names = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.name for path in PACKAGE.iterdir() if path.is_dir()
    }
    assert not (names - {"__init__", "__pycache__"}) & STANDARD


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unsafe_is_loaded_or_run(path: Path) -> None:
    lines = path.read_text("utf-8").splitlines()
    found = [
        f"{path.name}:{number}: {line.strip()} ({why})"
        for number, line in enumerate(lines, start=1)
        for pattern, why in UNSAFE.items()
        if re.search(pattern, line.partition("#")[0])
    ]
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path, weights_only=False)",
        "torch.load(path)",
        "pickle.load(file)",
        "from pickle import load",
        "yaml.load(text)",
        "eval(text)",
        "os.system('rm x')",
        "subprocess.run(line, shell=True)",
    ],
)
def test_an_unsafe_line_is_noticed(line: str) -> None:
    assert any(re.search(pattern, line) for pattern in UNSAFE)


@pytest.mark.parametrize("line", ["model.eval()", "torch.load(path, weights_only=True)", "store.load(key)"])
def test_a_safe_line_passes(line: str) -> None:
    assert not any(re.search(pattern, line) for pattern in UNSAFE)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_our_signatures_name_every_argument(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    found = [
        f"{path.name}:{node.lineno}: {node.name} takes **{node.args.kwarg.arg}"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.args.kwarg is not None
    ]
    assert not found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_public_name_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    silent = [f"{path.name}:1: the module"] if ast.get_docstring(tree) is None else []
    silent += [
        f"{path.name}:{node.lineno}: {node.name}"
        for node in tree.body
        if isinstance(node, Definition) and not node.name.startswith("_") and ast.get_docstring(node) is None
    ]
    assert not silent


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_left_for_later(path: Path) -> None:
    found = [
        f"{path.name}:{number}: {line.strip()}"
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
        if re.search(r"\b(TODO|FIXME|XXX|HACK|NotImplementedError)\b", line)
    ]
    assert not found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_writes_module_globals(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    assert not [f"{path.name}:{node.lineno}" for node in ast.walk(tree) if isinstance(node, ast.Global)]


IMPORTED_BEFORE_FLAGS_ARE_READ = """
import runpy, sys
slow = {"av", "deepspeed", "diffusers", "tensorboard", "torch._dynamo", "transformers"}
for path in sys.argv[1:]:
    runpy.run_path(path)
    assert not slow & set(sys.modules), f"{path} imports {slow & set(sys.modules)}"
"""


def test_what_the_mutations_take_out_stands_in_the_source() -> None:
    """`pytest -m faults` runs seldom; whoever moves a guard should hear of it before."""
    places = {name: (file, old) for name, (file, old, _, _) in MUTATIONS.items()}
    moved = [name for name, (file, old) in places.items() if (ROOT / file).read_text("utf-8").count(old) != 1]
    assert moved == [], "tests/faults/test_mutations.py names lines of these that are no longer there"


def test_help_and_mistakes_wait_for_no_slow_import() -> None:
    commands = [PACKAGE / "train.py", *sorted((ROOT / "tools").glob("*.py"))]
    words = [sys.executable, "-c", IMPORTED_BEFORE_FLAGS_ARE_READ, *map(str, commands)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
