# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""A training run's settings: which keys a YAML may have, and how a file and its overrides become a TrainConfig.

Names and meanings are llm-foundry's wherever it has one. What the sections (``model``, ``train_loader``, ...) may hold
is not known here: each is checked against its builder's signature, see :mod:`composer_bema.training.registry`.
"""

import contextlib
import dataclasses
import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.basecontainer import BaseContainer
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

__all__ = [
    'ConfigError',
    'TrainConfig',
    'check_top_level',
    'load_config',
    'read_settings',
    'reject_unknown',
    'suggest',
]

T = TypeVar('T')

# The longest list of names that still helps whoever reads an error message.
MOST_LISTED = 24


class ConfigError(ValueError):
    """A setting, or a file that a setting names, is wrong; the message is one sentence meant for whoever wrote it."""


@dataclasses.dataclass
class TrainConfig:
    """Every top-level key of a training YAML; ``max_duration``, the intervals and so on are Composer's time strings."""

    # What is trained, on what
    model: dict[str, Any]
    tokenizer: dict[str, Any]
    train_loader: dict[str, Any]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    max_duration: int | str
    max_seq_len: int
    """Tokens in a sequence; also the ``max_seq_len`` of every loader's ``dataset`` that names none."""
    global_train_batch_size: int
    """Sequences in an optimizer step, over all devices."""
    device_train_microbatch_size: int | str | None = None
    """Sequences in a forward pass on one device, or ``auto`` (GPU); None: a device's whole share of the batch."""
    accumulate_train_batch_on_tokens: bool = True
    """Weigh microbatches and devices by their target tokens, so that every token of a batch weighs the same."""
    precision: str | None = None
    """Composer's precision; None: amp_bf16 on a GPU, fp32 on a CPU."""
    seed: int = 17
    algorithms: dict[str, Any] | None = None
    callbacks: dict[str, Any] | None = None
    fsdp_config: dict[str, Any] | None = None
    compile_config: dict[str, Any] | None = None
    dist_timeout: float = 600.0
    """Seconds."""

    # Evaluation. eval_loader is one loader or a list of them, each with its `label`
    eval_loader: Any = None
    eval_interval: int | str = '1ep'
    eval_first: bool = False
    eval_subset_num_batches: int = -1
    device_eval_batch_size: int | None = None
    """Sequences; None: a device's share of the training batch."""

    # Checkpoints
    save_folder: str | None = None
    save_interval: int | str = '1000ba'
    save_num_checkpoints_to_keep: int = -1
    save_overwrite: bool = False
    """Replace what an earlier run of this name left, in ``run_folder`` as in ``save_folder``."""
    save_weights_only: bool = False
    load_path: str | None = None
    load_weights_only: bool = False
    autoresume: bool = False

    # Records
    run_name: str | None = None
    """None: the YAML's file name."""
    run_folder: str | None = None
    """Where settings, metrics and the picture go; None: ``runs/${run_name}``."""
    loggers: dict[str, Any] | None = None
    progress_bar: bool = True
    log_to_console: bool = False
    console_log_interval: int | str = '1ba'
    python_log_level: str | None = None

    # The one home of values that only interpolations read
    variables: dict[str, Any] | None = None


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a training YAML, apply ``key.path=value`` overrides, resolve interpolations and check the top level.

    Args:
        path: The YAML file.
        overrides: Later ones win; values are YAML; list items are addressed by index (``eval_loader.0.label=ema``).

    Raises:
        ConfigError: The file cannot be read, a key is unknown or missing, or a value has the wrong type.
    """
    defaults = {'run_name': Path(path).stem, 'run_folder': 'runs/${run_name}'}
    return check_top_level(read_settings(path, overrides, defaults), TrainConfig)


def read_settings(
    path: str | Path, overrides: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Read a YAML, apply ``key.path=value`` overrides and resolve interpolations.

    Args:
        path: The YAML file.
        overrides: Later ones win.
        defaults: Values of keys that are missing or empty; interpolations may refer to them.

    Raises:
        ConfigError: The file cannot be read or holds no ``key: value`` pairs, or an override is malformed.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"No such settings file: '{path}'.")
    try:
        with _own_resolvers():
            settings = _resolved(path, overrides, defaults or {})
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' is not valid YAML: {_one_line(error)}.") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"'{path}', key '{error.full_key}': {_first_line(error)}.") from error
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


def _apply_override(config: Any, override: str) -> None:
    key, equals, text = override.partition('=')
    if not equals or not key:
        raise ConfigError(f"Override '{override}' is not of the form key=value.")
    try:
        # from_dotlist parses the value, whose interpolations wait for the whole. update, unlike merge, reaches into
        # lists.
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f'value={text}']), resolve=False)
        assert isinstance(parsed, dict)
        parent = key.rpartition('.')[0]
        if parent and not OmegaConf.is_config(OmegaConf.select(config, parent)):
            OmegaConf.update(config, parent, {})
        OmegaConf.update(config, key, parsed['value'], merge=False)
    except YAMLError as error:
        raise ConfigError(f"The value of the override '{override}' is not valid YAML: {_one_line(error)}.") from error
    except (OmegaConfBaseException, IndexError, TypeError, ValueError) as error:
        raise ConfigError(f"Override '{override}': {_first_line(error)}.") from error


def check_top_level(settings: Mapping[str, Any], record: type[T], path: str = '') -> T:
    """Make a dataclass of settings.

    Args:
        settings: Its fields; those left empty have their defaults.
        record: The dataclass.
        path: The dotted key that the settings are under.

    Raises:
        ConfigError: A key is unknown or missing, or a value has the wrong type.
    """
    prefix = f'{path}.' if path else ''
    fields = {field.name: field for field in dataclasses.fields(record)}  # pyright: ignore[reportArgumentType]
    reject_unknown(settings, fields, path)
    for name, field in fields.items():
        is_required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if is_required and settings.get(name) is None:
            raise ConfigError(f'{prefix}{name} is missing from the settings.')
    merged = OmegaConf.structured(record)
    with _own_resolvers():
        for name, value in settings.items():
            # A key left empty in the YAML means its default, as if it were not there.
            if value is not None:
                try:
                    merged = OmegaConf.merge(merged, {name: value})
                except (OmegaConfBaseException, TypeError) as error:
                    raise ConfigError(f'{prefix}{name}: {_first_line(error)}.') from error
        config = OmegaConf.to_object(merged)
    assert isinstance(config, record)
    return config


def _resolved(path: Path, overrides: Sequence[str], defaults: Mapping[str, Any]) -> Any:
    config: Any = OmegaConf.load(path)
    if not OmegaConf.is_dict(config):
        raise ConfigError(f"'{path}' must hold `key: value` pairs at its top level.")
    for override in overrides:
        _apply_override(config, override)
    for key, default in defaults.items():
        # Set before interpolations are resolved, for others may refer to it; and so looked up without resolving.
        raw: Any = OmegaConf.to_container(config, resolve=False)
        if raw.get(key) is None:
            config[key] = default
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


@contextlib.contextmanager
def _own_resolvers() -> Iterator[None]:
    """Lets interpolations use what OmegaConf has itself: what other packages register is code, and there for all."""
    registered = BaseContainer._resolvers
    OmegaConf.clear_resolvers()
    try:
        yield
    finally:
        BaseContainer._resolvers = registered


def reject_unknown(names: Iterable[str], known: Collection[str], path: str = '') -> None:
    """Raise a ConfigError for the first of ``names`` (under the dotted ``path``) that is not among ``known``."""
    prefix = f'{path}.' if path else ''
    for name in names:
        if name not in known:
            raise ConfigError(f'{prefix}{name} is not a setting{suggest(str(name), known, prefix)}.')


def suggest(name: str, known: Collection[str], prefix: str = '') -> str:
    """The end of a sentence about an unknown name: the nearest known one; when none is near, all, if they are few."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if nearest:
        return f"; the nearest one is '{prefix}{nearest[0]}'"
    if len(known) > MOST_LISTED:
        return ''
    return f' (known: {", ".join(sorted(known))})' if known else ' (none is accepted here)'


def _first_line(error: Exception) -> str:
    return str(error).split('\n', maxsplit=1)[0].rstrip('.')


def _one_line(error: Exception) -> str:
    return ' '.join(str(error).split()).rstrip('.')
