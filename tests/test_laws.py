"""The laws of import: who may know what, read from the sources and not from what happens to be loaded."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SERVER = ROOT / "server" / "maskwire_server"
CLIENT = ROOT / "client" / "maskwire"
RUN = ("journal", "checkpoints", "recovery", "engine")
"""Each may import those before it."""
GROUPS = (("rpc",), RUN, ("training", "ranks"), ("telemetry",))
FOUNDATIONS = {
    "config",
    "errors",
    "events",
    "run_figures",
    "call_context",
    "batch",
    "step_listing",
    "session_holder",
    "manifest",
    "position",
    "requests",
    "results",
    "run_status",
}


@functools.cache
def tree(path: Path) -> ast.Module:
    """The syntax of a file."""
    return ast.parse(path.read_text())


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Every module that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def sources(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*.py")) if "_pb2" not in path.name]


def knows(path: Path, package: str) -> bool:
    return any(name == package or name.startswith(package + ".") for name in imports(path))


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("torch", ["training", "ranks"]),
        ("safetensors", ["training"]),
        ("grpc", ["rpc", "app.py"]),
        ("sqlite3", ["journal"]),
        ("prometheus_client", ["telemetry"]),
        ("opentelemetry", ["telemetry"]),
        ("tensorboard", ["telemetry"]),
        ("fsspec", ["journal"]),
    ],
)
def test_each_heavy_package_is_known_in_one_place_of_the_server(package: str, allowed: list[str]) -> None:
    found = {path.relative_to(SERVER) for path in sources(SERVER) if knows(path, package)}
    assert found, f"nobody imports {package}: the test looks in the wrong place"
    assert not {path for path in found if path.parts[0] not in allowed}


def test_object_stores_are_known_in_one_module() -> None:
    found = [path.name for path in sources(SERVER) if knows(path, "fsspec") or knows(path, "s3fs")]
    assert found == ["object_store.py"]


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group[0])
def test_groups_of_packages_never_import_one_another(group: tuple[str, ...]) -> None:
    others = {name for other in GROUPS if other != group for name in other}
    for package in group:
        for path in sources(SERVER / package):
            for other in others:
                assert not knows(path, f"maskwire_server.{other}"), path
            for composition in ("app", "cli", "weight_import_export"):
                assert not knows(path, f"maskwire_server.{composition}"), path


@pytest.mark.parametrize("package", RUN)
def test_the_packages_of_a_run_depend_in_one_direction(package: str) -> None:
    """Imports for type checking count too: the sources are read, nothing is imported."""
    above = RUN[RUN.index(package) + 1 :]
    for path in sources(SERVER / package):
        for other in above:
            assert not knows(path, f"maskwire_server.{other}"), path


def test_the_foundations_know_nothing_above_them() -> None:
    for name in FOUNDATIONS:
        paths = sources(SERVER / name) or [SERVER / f"{name}.py"]
        for path in paths:
            for imported in imports(path):
                if imported.startswith("maskwire_server."):
                    assert imported.split(".")[1] in FOUNDATIONS, f"{path} imports {imported}"


def test_the_server_knows_only_the_wire_contract_of_the_client() -> None:
    for path in sources(SERVER):
        for name in imports(path):
            if name == "maskwire" or name.startswith("maskwire."):
                assert name.startswith(("maskwire.v1", "maskwire._version")), f"{path} imports {name}"


def test_the_client_never_imports_the_server_nor_torch() -> None:
    for path in sources(CLIENT):
        for package in ("maskwire_server", "torch"):
            assert not knows(path, package), path


def test_only_the_modules_that_join_packages_know_telemetry_and_it_knows_only_values() -> None:
    """The formats of the log are for the command line, which writes before there is a run."""
    users = {
        path.relative_to(SERVER).as_posix()
        for path in sources(SERVER)
        if knows(path, "maskwire_server.telemetry") and path.relative_to(SERVER).parts[0] != "telemetry"
    }
    assert users == {"app.py", "cli/options.py", "error_output.py"}
    for path in sources(SERVER / "telemetry"):
        for name in imports(path):
            if name.startswith("maskwire_server."):
                assert name.split(".")[1] in FOUNDATIONS | {"telemetry"}, f"{path} imports {name}"


def test_the_packages_of_telemetry_are_imported_where_a_setting_asks_for_them() -> None:
    heavy = ("prometheus_client", "opentelemetry", "tensorboard")
    for name in ("start", "metrics", "sample_text", "log_formats"):
        for package in heavy:
            assert not knows(SERVER / "telemetry" / f"{name}.py", package), name
    for path in sources(CLIENT):
        if path.name in ("step_spans.py", "tracing.py", "trace_sampling.py", "tensorboard.py"):
            continue
        assert not any(knows(path, package) for package in heavy), path


def test_ranks_know_the_trainer_and_the_trainer_knows_no_ranks_of_other_processes() -> None:
    for path in sources(SERVER / "training"):
        assert not knows(path, "maskwire_server.ranks"), path


def test_no_pickle_travels_between_ranks_or_is_loaded() -> None:
    """torch's collectives of Python objects pickle them. Its loader is used with weights_only=True alone."""
    objects = ("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list",
               "send_object_list", "recv_object_list")  # fmt: skip
    for path in sources(SERVER):
        called = {node.attr for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
        assert not called & set(objects), path
        assert not knows(path, "pickle"), path
        assert not knows(path, "torch.distributed.checkpoint"), f"{path}: it pickles plans and metadata"


def test_the_objective_knows_no_model_and_the_model_no_objective() -> None:
    training = SERVER / "training"
    names = (
        "objective", "evaluation", "chain_rule", "evaluation_figures", "sampling", "corruption",
        "masking_schedule", "draws", "cross_entropy", "quadrature", "batch_losses",
    )  # fmt: skip
    for name in names:
        for other in ("models", "optimizers", "trainer"):
            assert not knows(training / f"{name}.py", f"maskwire_server.training.{other}"), name
    for other in ("objective", "optimizers", "trainer", "evaluation"):
        for path in sources(training / "models"):
            assert not knows(path, f"maskwire_server.training.{other}"), path
    assert not knows(SERVER / "rpc" / "service.py", "numpy"), "the service knows no tensor"


def test_no_pickle_anywhere_but_foreign_weights_and_those_without_their_code() -> None:
    importer = SERVER / "training" / "models" / "weight_files.py"
    for path in [*sources(SERVER), *sources(CLIENT)]:
        assert not knows(path, "pickle"), path
        calls = [
            node
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
        ]
        assert path.read_text().count("torch.load") == len(calls), f"{path}: torch.load by another name"
        assert path == importer or not calls, path
        for call in calls:
            assert "weights_only=True" in [ast.unparse(keyword) for keyword in call.keywords], path


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import maskwire; maskwire.connect", ["torch", "typer", "rich", "maskwire_server", "opentelemetry"]),
        ("import maskwire.v1", ["torch", "typer", "rich", "grpc", "numpy"]),
        ("import maskwire_server.cli", ["torch", "grpc", "maskwire_server.app"]),
        (
            "import maskwire_server.app",
            ["torch", "prometheus_client", "opentelemetry", "tensorboard", "fsspec", "s3fs"],
        ),
    ],
)
def test_importing_stays_light(statement: str, absent: list[str]) -> None:
    code = f"{statement}\nimport sys\nprint([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def module_graph(folder: Path) -> dict[str, set[str]]:
    """The imports between the modules of a package, type-checking imports included.

    `from package import module` imports the module; any other name is the package's own. Not counted is that
    Python runs a package before each module in it, because then a package would form a cycle with every
    module whose names it offers, as `maskwire` with `maskwire.client`. That is harmless while no such module
    takes a name from the package, or imports it by its own name; both are counted.
    """
    modules = files(folder)
    return {
        module: set().union(*(imported(node, modules) for node in ast.walk(tree(path)))) - {module}
        for module, path in modules.items()
    }


def files(folder: Path) -> dict[str, Path]:
    """The modules of a package."""
    found = {
        ".".join(path.relative_to(folder.parent).with_suffix("").parts): path for path in sources(folder)
    }
    return {name.removesuffix(".__init__"): path for name, path in found.items()}


def imported(node: ast.AST, modules: dict[str, Path]) -> set[str]:
    """The modules of a package that a statement imports."""
    found: set[str] = set()
    if isinstance(node, ast.Import):
        found = {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
        names = {f"{node.module}.{alias.name}" for alias in node.names}
        found = {name if name in modules else node.module or "" for name in names}
    return found & modules.keys()


def cycles(graph: dict[str, set[str]]) -> set[str]:
    """The modules that import one another in a cycle."""
    left = {module: set(imported) for module, imported in graph.items()}
    while True:
        ends = {module for module, imported in left.items() if not imported & left.keys()}
        if not ends:
            break
        left = {module: imported for module, imported in left.items() if module not in ends}
    while True:  # and those that nothing of the rest imports
        used = set().union(*left.values()) if left else set()
        if left.keys() <= used:
            return set(left)
        left = {module: imported for module, imported in left.items() if module in used}


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("from maskwire import results", {"maskwire.results"}),
        ("from maskwire import connect", {"maskwire"}),
        ("from maskwire import connect, results", {"maskwire", "maskwire.results"}),
        ("import maskwire, maskwire.errors", {"maskwire", "maskwire.errors"}),
        ("from maskwire.errors import MaskwireError", {"maskwire.errors"}),
        ("import torch", set()),
    ],
)
def test_a_statement_imports_modules_and_the_packages_whose_names_it_takes(
    statement: str, found: set[str]
) -> None:
    assert imported(ast.parse(statement).body[0], files(CLIENT)) == found


def test_a_cycle_is_found() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == {"b", "c"}


@pytest.mark.parametrize("folder", [SERVER, CLIENT], ids=["server", "client"])
def test_modules_import_one_another_in_one_direction(folder: Path) -> None:
    assert cycles(module_graph(folder)) == set()


MOST_LINES = 350


def test_no_source_file_is_longer_than_a_reader_can_keep_in_mind() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in [*sources(SERVER), *sources(CLIENT)]}
    assert len(lengths) > 100
    too_long = {str(path.relative_to(ROOT)): count for path, count in lengths.items() if count > MOST_LINES}
    assert not too_long, f"split them: the limit is {MOST_LINES} lines"
