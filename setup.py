"""Where the packages and their data lie. Everything else about the project is in pyproject.toml."""

from setuptools import find_packages, setup

# Folders at the top level that are installed inside the package.
FOLDERS = ("bench", "kernels", "profiles")

setup(
    packages=[
        *find_packages(include=["omnigen_fast*"]),
        *(f"omnigen_fast.{name}" for name in FOLDERS),
        *(f"omnigen_fast.{name}" for name in find_packages(include=["bench.*"])),
        "omnigen_fast.bench.kernels",  # pytest collects it, so it has no __init__.py
    ],
    package_dir={f"omnigen_fast.{name}": name for name in FOLDERS},
    package_data={
        "omnigen_fast": [
            "example_images/*.png",
            "fewer_steps.json",
            "models/*/*",
            "models/*/inputs/*",
            "models/*/vae/*",
            "page/page.css",
            "page/page.js",
        ],
        "omnigen_fast.bench": ["counts.json"],
        "omnigen_fast.bench.kernels": ["pipes.json"],
        "omnigen_fast.kernels": ["cpu.cpp"],
        "omnigen_fast.profiles": ["*.json"],
    },
    include_package_data=False,  # the sdist has more than the wheel needs
)
