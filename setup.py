from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="jaxrl_llm",
    version="0.1.0",
    description="RL post-training of language models as pure functions on JAX",
    long_description=Path("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.12",
    package_dir={"jaxrl_kernels": "kernels/jaxrl_kernels"},
    packages=[
        *find_packages(include=["jaxrl_llm", "jaxrl_llm.*"]),
        *find_packages("kernels", include=["jaxrl_kernels", "jaxrl_kernels.*"]),
    ],
    package_data={"jaxrl_llm": ["py.typed"], "jaxrl_kernels": ["py.typed"]},
    install_requires=[
        "absl-py",
        "array_record",
        "clu",
        "flax",
        "importlib_resources",  # tensorflow-datasets needs it and does not declare it
        "jax>=0.10,<0.11",
        "jinja2",  # transformers' chat templates, undeclared
        "math-verify",
        "matplotlib",
        "ml-collections",
        "ml_dtypes",
        "numpy",
        "optax",
        "orbax-checkpoint",
        "pyarrow",
        "reasoning-gym",
        "rich",
        "safetensors",
        "sentencepiece<=0.2.1",
        "tensorboardX",
        "tensorflow-datasets",
        "tokenizers",
        "transformers>=5",
    ],
    extras_require={
        "test": ["hypothesis", "mypy", "openai", "pytest", "pytest-xdist", "ruff"],
        "serve": ["starlette", "uvicorn"],
        "guided": ["outlines-core"],
        "tpu": ["jax[tpu]>=0.10,<0.11"],
        "cuda-aot": ["jax-cuda13-pjrt>=0.10,<0.11", "jax-cuda13-plugin>=0.10,<0.11"],
        "oracle": ["torch==2.13.0"],
        "notebooks": ["ipykernel", "nbclient"],
    },
    entry_points={
        "console_scripts": [
            "jaxrl-train = jaxrl_llm.console:train",
            "jaxrl-evaluate = jaxrl_llm.console:evaluate",
            "jaxrl-sample = jaxrl_llm.console:sample",
            "jaxrl-serve = jaxrl_llm.console:serve",
        ]
    },
)
