from setuptools import setup

setup(
    name="omnigen_fast",
    version="0.1.0",
    description="A fast, exact runtime for the OmniGen image generation model",
    python_requires=">=3.10",
    packages=[
        "omnigen_fast",
        "omnigen_fast.bench",
        "omnigen_fast.bench.gpu",
        "omnigen_fast.bench.kernels",
        "omnigen_fast.bench.peers",
        "omnigen_fast.kernels",
        "omnigen_fast.memory",
        "omnigen_fast.profiles",
    ],
    package_dir={
        "omnigen_fast.bench": "bench",
        "omnigen_fast.kernels": "kernels",
        "omnigen_fast.profiles": "profiles",
    },
    package_data={
        "omnigen_fast": ["models/*/*", "models/*/vae/*"],
        "omnigen_fast.bench": ["counts.json"],
        "omnigen_fast.profiles": ["*.json"],
    },
    install_requires=[
        "torch>=2.11,<2.14",
        "triton>=3.6,<3.8; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "safetensors>=0.4.5",
        "tokenizers>=0.20",
        "huggingface_hub>=0.25",
        "diffusers>=0.31",
        "pillow>=10.3",
        "numpy>=1.26",
        "tqdm>=4.66",
        "click>=8.1",
    ],
    extras_require={
        "bench": ["matplotlib>=3.8", "psutil>=5.9"],
        "dev": [
            "matplotlib>=3.8",
            "pytest>=8",
            "pytest-benchmark>=4",
            "hypothesis>=6.100",
            "peft>=0.13",
            "psutil>=5.9",
            "ruff==0.17.6",
        ],
    },
    entry_points={"console_scripts": ["omnigen-fast = omnigen_fast.cli:main"]},
)
