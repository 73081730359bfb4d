# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What is installed, and with what; the settings of the tools are in `pyproject.toml`."""

import re
import zlib
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """The version, read and not imported: while the package is being built its dependencies are not there."""
    match = re.search(r"^__version__ = '(.+)'$", (ROOT / 'composer_bema/version.py').read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError("composer_bema/version.py has no line `__version__ = '...'`")
    return match.group(1)


# What averages take for models in host memory; without a C compiler they are taken by torch alone. The library asks
# nothing of Python, which only loads it and has to know that it is of the source that lies beside it.
KERNELS = 'composer_bema/averaging/compiled_kernels.c'
COMPILED_KERNELS = Extension(
    'composer_bema.averaging._compiled_kernels',
    sources=[KERNELS],
    depends=['setup.py'],
    define_macros=[('SOURCE_DIGEST', f'{zlib.crc32((ROOT / KERNELS).read_bytes())}u')],
    extra_compile_args=['-std=c11', '-O3', '-fopenmp-simd', '-fno-math-errno', '-ffp-contract=off'],
    libraries=['m'],
    py_limited_api=True,
    optional=True,
)

# Lower bounds admit llm-foundry 0.22, so that one environment holds both. Composer itself bounds torch and numpy from
# above, but transformers and datasets only in its `nlp` extra, whose upper bounds are repeated here.
INSTALL_REQUIRES = [
    'mosaicml>=0.31,<0.33',
    'torch>=2.6',
    'numpy>=1.26',
    'transformers>=4.51,<4.54',
    'datasets>=3.3.2,<5',
    'mosaicml-streaming>=0.12,<1',
    'safetensors>=0.5.3,<1',
    'huggingface-hub>=0.30,<1',
    'omegaconf>=2.3,<3',
    'pyyaml>=6.0,<7',
    'click>=8.1,<9',
    'matplotlib>=3.8,<4',
    'jinja2>=3.1,<4',
    'tabulate>=0.9,<1',
    'tqdm>=4.62,<5',
    'xxhash>=3.0,<4',
    'packaging>=21.3,<26',
]

PEFT = ['peft>=0.10,<0.17']

# scikit-learn has the digits of the image study.
EVAL = ['lm-eval>=0.4.13,<0.5', 'scikit-learn>=1.4,<2']

# llm-foundry wants a transformers before 4.52 and TRL from 0.20 on a later one, so no environment has both. TRL from
# 0.21 on wants one that Composer excludes. llm-foundry imports pkg_resources, which setuptools 82 no longer has.
EXTRAS_REQUIRE = {
    'eval': EVAL,
    'llmfoundry': ['llm-foundry>=0.22,<0.23', 'setuptools<82'],
    'peft': PEFT,
    'trl': ['trl>=0.20,<0.21'],
    # sybil runs the code in README and docs, and Composer's TensorBoard logger wants tensorboard.
    'test': [*PEFT, *EVAL, 'pytest>=9,<10', 'hypothesis>=6.100,<7', 'sybil>=9,<11', 'tensorboard>=2.9,<3'],
    'docs': ['sphinx>=8,<10', 'myst-parser>=4,<6', 'furo>=2024.8'],
    # Exact, so that a new release of a linter fails nobody's build. `pyright[nodejs]` takes node from a wheel: plain
    # `pyright` downloads it at its first run, from a host that a machine with only a package index cannot reach.
    'lint': ['ruff==0.17.6', 'pyright[nodejs]==1.1.414', 'pre-commit>=4,<5'],
}

setup(
    name='composer_bema',
    version=read_version(),
    description='Weight averaging without the lag (BEMA) for MosaicML Composer',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author='composer_bema authors',
    license='Apache-2.0',
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3 :: Only',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Typing :: Typed',
    ],
    python_requires='>=3.10,<3.13',
    packages=find_packages(include=['composer_bema', 'composer_bema.*']),
    package_data={'composer_bema': ['py.typed', 'averaging/*.c', 'training/*.html']},
    ext_modules=[COMPILED_KERNELS],
    # One wheel for all versions of Python.
    options={'bdist_wheel': {'py_limited_api': 'cp310'}},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={
        'console_scripts': ['composer-bema = composer_bema.cli:main'],
        # llm-foundry fills its registries from these groups, so that its YAMLs can name ours.
        'llmfoundry_algorithms': [
            'bema = composer_bema.algorithms:BEMA',
            'dema = composer_bema.algorithms:DEMA',
            'ema = composer_bema.algorithms:EMA',
            'lawa = composer_bema.algorithms:LAWA',
            'ouema = composer_bema.algorithms:OUEMA',
            'swa_window = composer_bema.algorithms:SWAWindow',
        ],
        'llmfoundry_schedulers': [
            'cosine_with_constant_tail = composer_bema.lr_schedulers:CosineAnnealingWithConstantTailScheduler',
            'warmup_stable_decay = composer_bema.lr_schedulers:WarmupStableDecayScheduler',
        ],
        'llmfoundry_callbacks': ['flops_monitor = composer_bema.training.callbacks:FlopsMonitor'],
    },
)
