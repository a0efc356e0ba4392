"""The arrows of DESIGN.md: which module may import which, read from the source with `ast`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGES = ("memphis_jax", "convert")
CONFIG = "memphis_jax.config"

# The modules of ours that a module may import. What is not listed here follows `may_import`.
ALLOWED: dict[str, set[str]] = {
    "memphis_jax.fields": set(),
    "memphis_jax.model_config": {"memphis_jax.fields"},
    "memphis_jax.training_config": {"memphis_jax.fields", "memphis_jax.model_config"},
    CONFIG: {"memphis_jax.fields", "memphis_jax.model_config", "memphis_jax.training_config"},
    "memphis_jax.losses": set(),
    "memphis_jax.neftune": set(),
    "memphis_jax.adalite": set(),
    "memphis_jax.data.prompts": set(),
    "memphis_jax.rounds.grade": set(),
    "memphis_jax.interpolate": set(),
    "memphis_jax.tensors": set(),
    "memphis_jax.rounds.pairs": set(),
    "memphis_jax.layers": set(),
    "memphis_jax.model": {CONFIG, "memphis_jax.layers"},
    "memphis_jax.optimizer": {CONFIG, "memphis_jax.adalite"},
    "memphis_jax.sharding": {CONFIG},
}
CONVERT_MAY_IMPORT = {
    *(CONFIG, "memphis_jax.fields", "memphis_jax.model", "memphis_jax.checkpoint"),
    *("memphis_jax.tensors", "memphis_jax.rounds.files", "memphis_jax.rounds.certificate"),
}

# These run on machines without JAX: a GPU host that generates, a laptop that grades.
JAX_FREE = {
    "memphis_jax.data.prompts",
    "memphis_jax.interpolate",
    "memphis_jax.merge",
    "memphis_jax.merge_report",
    "memphis_jax.model_card",
    "memphis_jax.publish",
    "memphis_jax.rounds.answers",
    "memphis_jax.rounds.audit",
    "memphis_jax.rounds.blocks",
    "memphis_jax.rounds.choices",
    "memphis_jax.rounds.engine",
    "memphis_jax.rounds.files",
    "memphis_jax.rounds.generate",
    "memphis_jax.rounds.grade",
    "memphis_jax.rounds.ledger",
    "memphis_jax.rounds.pairs",
    "memphis_jax.rounds.quantities",
    "memphis_jax.rounds.rows",
    "memphis_jax.rounds.scribe",
    "memphis_jax.rounds.shards",
    "memphis_jax.rounds.sweep",
    "memphis_jax.rounds.symbolic",
}
JAX = ("jax", "jaxlib", "flax", "optax", "orbax")


def read_modules(root: Path) -> dict[str, set[str]]:
    """Map each module under `root`'s packages to the full names of all it imports, at any depth.

    An import inside a function or under TYPE_CHECKING counts like any other. `from p import n` is
    `p.n` where that is a module of ours, else `p`.
    """
    paths: dict[str, Path] = {}
    for path in (path for package in PACKAGES for path in (root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: _imports(name, path, set(paths)) for name, path in paths.items()}


def _imports(module: str, path: Path, ours: set[str]) -> set[str]:
    found: set[str] = set()
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in ours else base for name in names}
    return found


def _is_under(name: str, packages: tuple[str, ...]) -> bool:
    return name.split(".")[0] in packages


def may_import(module: str, imported: str) -> bool:
    """Whether `module` may import `imported`, both of ours."""
    if module in ALLOWED:
        return imported in ALLOWED[module]
    if _is_under(module, ("convert",)):
        return imported in CONVERT_MAY_IMPORT or _is_under(imported, ("convert",))
    return not _is_under(imported, ("convert",))


def forbidden_arrows(imports: dict[str, set[str]]) -> list[str]:
    """Every import among our modules that `may_import` refuses."""
    return [
        f"{module} imports {name}"
        for module in sorted(imports)
        for name in sorted(imports[module])
        if _is_under(name, PACKAGES) and not may_import(module, name)
    ]


def ways_to_jax(imports: dict[str, set[str]]) -> list[str]:
    """For each module of JAX_FREE, the chains of imports that reach JAX, packages' own included."""
    chains = []
    for start in sorted(JAX_FREE & set(imports)):
        seen: set[str] = set()
        queue = [(start,)]
        while queue:
            chain = queue.pop()
            parts = chain[-1].split(".")
            # Importing a.b.c runs a and a.b as well.
            steps = {".".join(parts[:n]) for n in range(1, len(parts))} | imports[chain[-1]]
            for name in sorted(steps - seen):
                seen.add(name)
                if _is_under(name, JAX):
                    chains.append(" -> ".join((*chain, name)))
                elif name in imports:
                    queue.append((*chain, name))
    return chains


def test_arrows_point_one_way() -> None:
    assert forbidden_arrows(read_modules(REPO)) == []


def test_no_way_from_the_jax_free_modules_to_jax() -> None:
    assert ways_to_jax(read_modules(REPO)) == []


def test_jax_free_modules_import_where_jax_is_not_installed() -> None:
    """Libraries count too: with JAX blocked, each module still imports."""
    modules = sorted(JAX_FREE & set(read_modules(REPO)))
    code = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({JAX!r}))
for name in {modules!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_row_names_a_module() -> None:
    """A row whose module was renamed away would hold nothing."""
    rows = ALLOWED.keys() | JAX_FREE | CONVERT_MAY_IMPORT
    assert rows - read_modules(REPO).keys() == set()


@pytest.mark.parametrize(
    ("file", "source", "arrows"),
    [
        ("memphis_jax/losses.py", "import memphis_jax.config", ["memphis_jax.config"]),
        ("memphis_jax/losses.py", "from . import config", ["memphis_jax.config"]),
        ("memphis_jax/losses.py", "from memphis_jax import __version__", ["memphis_jax"]),
        ("memphis_jax/data/prompts.py", "from ..config import Config", ["memphis_jax.config"]),
        ("memphis_jax/model.py", "from memphis_jax import config, train", ["memphis_jax.train"]),
        ("memphis_jax/train.py", "def f():\n    import convert", ["convert"]),
        ("memphis_jax/rounds/__init__.py", "from ..losses import ce\nfrom .x import y", []),
        ("convert/mapping.py", "from memphis_jax.train import step", ["memphis_jax.train"]),
        ("convert/mapping.py", "from memphis_jax import model\nfrom . import to_hf", []),
    ],
)
def test_planted_arrow(tmp_path: Path, file: str, source: str, arrows: list[str]) -> None:
    imports = read_modules(_tree(tmp_path, {file: source}))
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert forbidden_arrows(imports) == [f"{module} imports {name}" for name in arrows]


@pytest.mark.parametrize(
    ("files", "chain"),
    [
        ({"rounds/pairs.py": "import optax"}, "pairs -> optax"),
        ({"rounds/pairs.py": "def f():\n    from jax import numpy"}, "pairs -> jax"),
        ({"rounds/__init__.py": "import flax.nnx"}, "pairs -> memphis_jax.rounds -> flax.nnx"),
        (
            {"rounds/pairs.py": "from ..losses import ce", "losses.py": "import jax.numpy as jnp"},
            "pairs -> memphis_jax.losses -> jax.numpy",
        ),
        ({"losses.py": "import jax", "rounds/pairs.py": "import json"}, None),
    ],
)
def test_planted_way_to_jax(tmp_path: Path, files: dict[str, str], chain: str | None) -> None:
    root = _tree(tmp_path, {f"memphis_jax/{name}": text for name, text in files.items()})
    found = ways_to_jax(read_modules(root))
    assert found == ([] if chain is None else [f"memphis_jax.rounds.{chain}"])


def _tree(root: Path, sources: dict[str, str]) -> Path:
    """A small copy of the layout: empty modules, save for `sources`."""
    packages = ["memphis_jax", "memphis_jax/data", "memphis_jax/rounds", "convert"]
    modules = ["config", "losses", "model", "train", "data/prompts", "rounds/pairs"]
    names = [
        *(f"{package}/__init__.py" for package in packages),
        *(f"memphis_jax/{module}.py" for module in modules),
        *("convert/mapping.py", "convert/to_hf.py"),
    ]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(sources.get(name, ""))
    return root
