"""How the project is built: imports go one way, and what it may not need."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.early

ROOT = Path(__file__).parents[1]
# Each module may import those before it.
ORDER = [
    "errors",
    "whole_files",
    "equivalents",
    "surroundings",
    "progress",
    "regular_files",
    "model_defaults",
    "config_settings",
    "config",
    "forms",
    "precision",
    "fewer_steps",
    "solvers",
    "schedule",
    "parameters",
    "parallel.layout",
    "memory.plan",
    "memory.terms",
    "memory.autoencoder",
    "memory.estimate",
    "memory.seconds",
    "memory.cost",
    "memory.device",
    "memory.planner",
    "memory.overview",
    "parallel.planner",
    "streaming",
    "parallel.failure",
    "parallel.group",
    "parallel.launch",
    "parallel.exchange",
    "parallel.digest",
    "image_files",
    "image_decoder",
    "images",
    "masks",
    "request",
    "guidance",
    "cache",
    "streamed_cache",
    "sequence",
    "tokenizer_file",
    "processor",
    "quantised",
    "linear",
    "model",
    "weights.files",
    "weights.names",
    "weights.checkpoint",
    "weights.pickles",
    "weights.gguf_files",
    "weights.foreign",
    "weights.lora",
    "weights.lora_scale",
    "weights.lora_sources",
    "weights.lora_files",
    "weights.store",
    "weights.writing",
    "vae.bands",
    "vae.strips",
    "vae.vae",
    "vae.preview",
    "conversion",
    "placement",
    "step_values",
    "denoise",
    "graph",
    "packing",
    "for_diffusers.conditions",
    "for_diffusers.binding",
    "for_diffusers.processor",
    "for_diffusers.calls",
    "for_diffusers.enable",
    "call",
    "attention",
    "compilation",
    "running",
    "holdings",
    "engine",
    "run",
    "loras",
    "saving",
    "diffusers_methods",
    "results",
    "pipeline",
    "serving.work",
    "serving.pace",
    "serving.admission",
    "serving.leading",
    "serving.job",
    "serving.scheduler",
    "serving.followers",
    "serving.metrics",
    "web.hosts",
    "web.bodies",
    "web.connections",
    "server.errors",
    "server.options",
    "server.gate",
    "server.schemas",
    "server.forms",
    "server.pictures",
    "server.streaming",
    "server.reference",
    "server.app",
    "server.run",
    "page.demo",
    "page.gallery",
    "page.embedded",
    "page.record",
    "batch.lines",
    "batch.results",
    "batch.run",
    "batch.on_ray",
    "page.job",
    "page.files",
    "page.line",
    "page.loras",
    "page.settings",
    "page.users",
    "page.bodies",
    "page.gate",
    "page.server",
    "page.components",
    "page.actions",
    "page.ui",
    "page.serve",
    "comfyui.install",
    "comfyui.memory",
    "comfyui.models",
    "comfyui.call",
    "comfyui.watch",
    "comfyui.nodes",
    "cli.process",
    "cli.failure",
    "cli.files",
    "cli.loading",
    "cli.config_file",
    "cli.sizes",
    "cli.rerun",
    "cli.calls",
    "cli.ranks",
    "cli.generate",
    "cli.batch",
    "cli.plan",
    "cli.convert",
    "cli.demo",
    "cli.env",
    "cli.doctor",
    "cli.completion",
    "cli.app",
    "cli.serve",
    "cli.comfyui",
    "cli.main",
    "app",
    "ray",
]
USE_KERNELS = {
    "memory.device",  # what AMD calls a GPU, and whether it has kernels
    "memory.estimate",
    "attention",
    "for_diffusers.enable",
    "call",
    "compilation",
    "quantised",
    "linear",
    "model",
    "denoise",
    "graph",
}
USE_PROFILES = {
    "memory.estimate",
    "memory.seconds",
    "memory.cost",
    "memory.planner",
    "memory.device",
    "memory.overview",
    "cli.plan",
    "parallel.planner",
    "serving.scheduler",
}


PACKAGE = ROOT / "omnigen_fast"
DOORS = {"__init__", "__main__"}  # hand on what their package holds


def _imports(path: Path) -> set[tuple[int, str]]:
    """(level, module) of every import, also those inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {(node.level, name) for name in names}
        elif isinstance(node, ast.Import):
            found |= {(0, alias.name) for alias in node.names}
    return found


def _own_imports(path: Path) -> set[str]:
    """Modules of this package that a file imports, lazily or not, by their names below it."""
    package = path.relative_to(PACKAGE).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = [*package[: len(package) + 1 - node.level], *(node.module or "").split(".")]
        name = ".".join(filter(None, base))
        for alias in node.names:
            inner = f"{name}.{alias.name}".lstrip(".")
            found.add(inner if inner in ORDER or not name else name)
    return found


def test_every_module_has_its_place():
    paths = [path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")]
    assert {".".join(path.parts) for path in paths if path.name not in DOORS} == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_go_one_way(module):
    allowed = set(ORDER[: ORDER.index(module)])
    if module in USE_KERNELS:
        allowed.add("kernels")
    if module in USE_PROFILES:
        allowed.add("profiles")
    if module in {"page.record", "server.app", "cli.env", "cli.main"}:
        allowed.add("__version__")
    found = _own_imports(PACKAGE / f"{module.replace('.', '/')}.py")
    assert found <= allowed, f"{module} imports {found - allowed}"


@pytest.mark.parametrize(
    "door", [path for path in PACKAGE.rglob("*.py") if path.stem in DOORS], ids=str
)
def test_doors_hand_on_their_own_package(door):
    """Whoever imports a module imports its package too: a door must not lead back up."""
    package = ".".join(door.relative_to(PACKAGE).parts[:-1])
    assert all(not package or name.startswith(f"{package}.") for name in _own_imports(door))


def test_kernels_import_torch_and_triton_only():
    for path in (ROOT / "kernels").glob("*.py"):
        for level, name in _imports(path):
            root = name.split(".")[0]
            allowed = root in {"torch", "triton"} or root in sys.stdlib_module_names
            assert level == 1 or allowed, f"{path.name} imports {name}"


def test_profiles_import_errors_only():
    for level, name in _imports(ROOT / "profiles/__init__.py"):
        root = name.split(".")[0]
        assert root in sys.stdlib_module_names or (level, name) == (2, "errors"), name


# peft itself needs transformers and accelerate: these three go together
@pytest.mark.slow_except("images")
@pytest.mark.parametrize(
    "packages",
    [{"torchvision", "timm"}, {"transformers", "accelerate", "peft"}],
    ids=["images", "language"],
)
def test_runs_without(packages):
    """A whole picture, with packages made impossible to find."""
    code = f"""
import importlib.machinery, importlib.metadata, sys
finder, version = importlib.machinery.PathFinder.find_spec, importlib.metadata.version
def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] in {packages!r} else finder(name, path, target)
def absent(name):
    if name in {packages!r}:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.machinery.PathFinder.find_spec, importlib.metadata.version = find_spec, absent
from omnigen_fast import OmniGenPipeline
pipe = OmniGenPipeline.from_pretrained({str(ROOT / "tests/golden/tiny")!r}, dtype="float32")
image, = pipe("<img><|image_1|></img> at night", [{str(ROOT / "tests/golden/images/cat.png")!r}],
              height=64, width=64, num_inference_steps=1, max_input_image_size=64, progress=False)
assert image.size == (64, 64)
assert not {packages!r} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_importing_needs_no_heavy_package():
    code = """
import sys, omnigen_fast
heavy = {"torch", "triton", "diffusers", "transformers", "PIL", "numpy"} & set(sys.modules)
assert not heavy, heavy
import omnigen_fast.pipeline
heavy = {"triton", "diffusers", "transformers", "huggingface_hub", "tokenizers"} & set(sys.modules)
assert not heavy, heavy
import omnigen_fast.cli
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
