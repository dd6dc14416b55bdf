"""From the config's words to a reward function, and from a batch of completions to its arguments.

A reward is asked for by name or by path, never as a function object, so that worker processes can load it:

    "reasoning_gym"                                  a built-in of `functions.REWARDS`
    "package.module.function"                        any importable function
    "path/to/file.py:function"                       the user's own file
    {"path": "format_regex", "options": {"pattern": "[0-9]+"}, "name": "digits"}

Two forms of function are accepted, told apart by their parameters:

    TRL   f(prompts, completions, completion_ids, **columns) -> list[float | None]      one call per batch
    verl  f(data_source, solution_str, ground_truth, extra_info=None) -> float | dict   one call per row

None means "not applicable" in both, and a dict holds its value under "score". Both may be `async`, and both
are passed exactly the parameters that they name (any column of the data may be one of them; a TRL function
with `**kwargs` gets all columns).
"""

import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from jaxrl_llm.rewards.functions import REWARDS

_BATCH = frozenset({"prompts", "completions", "completion_ids"})
_NOT_COLUMNS = frozenset({"prompt", "completion"}) | _BATCH
_SIGNATURES = """it must have one of these two forms:
    TRL:  f(prompts, completions, completion_ids, **columns) -> list[float | None]
    verl: f(data_source, solution_str, ground_truth, extra_info=None) -> float or dict with "score\""""


@dataclasses.dataclass(frozen=True)
class RewardSpec:
    """What to load: a built-in's name or a path, keyword options for it, and the name in the metrics."""

    path: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Reward:
    """A loaded reward function.

    Attributes:
      spec: where it came from; the only part that travels to another process.
      name: key of its metrics, `rewards/<name>/mean`.
      function: the function with its options bound.
      per_row: verl's form (one call per row) rather than TRL's (one call per batch).
      parameters: names that it accepts, without its options.
      required: those of them without a default.
      takes_columns: it has `**kwargs`.
    """

    spec: RewardSpec
    name: str
    function: Callable[..., Any]
    per_row: bool
    parameters: frozenset[str]
    required: frozenset[str]
    takes_columns: bool


@dataclasses.dataclass(frozen=True)
class Batch:
    """N completions to score: prompts (text or messages), texts, token ids, and N values per column."""

    prompts: Sequence[Any]
    completions: Sequence[str]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]]


def _plain(value: Any) -> Any:
    """The same with every mapping a dict, so that config objects do not travel to the workers."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    return value


def as_spec(spec: str | Mapping[str, Any] | RewardSpec) -> RewardSpec:
    """A spec from a name or path, or from a mapping with "path" and perhaps "options" and "name".

    Raises:
      ValueError: another key, or no path.
    """
    if isinstance(spec, RewardSpec):
        return spec
    if isinstance(spec, str):
        return RewardSpec(spec)
    unknown = set(spec) - {"path", "options", "name"}
    if unknown or not spec.get("path"):
        raise ValueError(
            f"a reward is a name, a path or a mapping with 'path', 'options' and 'name'; got {dict(spec)!r}"
        )
    return RewardSpec(spec["path"], _plain(spec.get("options") or {}), spec.get("name") or "")


def _module_from_file(path: str) -> ModuleType:
    path = os.path.abspath(os.path.expanduser(path))
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {path}")
    name = f"jaxrl_reward_{hashlib.sha256(path.encode()).hexdigest()[:12]}"
    folder = os.path.dirname(path)
    if folder not in sys.path:
        sys.path.append(folder)  # as for a script: the file may import its neighbours, now or when called
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None, path
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _load(path: str) -> Callable[..., Any]:
    """The function that `path` names. Raises ValueError where it cannot be had."""
    if path in REWARDS:
        return REWARDS[path]
    if ":" in path:
        where, _, attribute = path.rpartition(":")
    elif "." in path:
        where, _, attribute = path.rpartition(".")
    else:
        near = difflib.get_close_matches(path, REWARDS, n=1)
        raise ValueError(
            f"reward {path!r} is not a built-in ({', '.join(sorted(REWARDS))})"
            + (f"; did you mean {near[0]!r}?" if near else "")
            + "; your own is 'package.module.function' or 'path/to/file.py:function'"
        )
    try:
        module = _module_from_file(where) if ":" in path else importlib.import_module(where)
    except Exception as error:
        raise ValueError(f"reward {path!r} cannot be loaded: {type(error).__name__}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        functions = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(
            f"reward {path!r}: {where} has no function {attribute!r}; its functions are {functions}"
        )
    return function


def resolve(spec: str | Mapping[str, Any] | RewardSpec) -> Reward:
    """Load a reward function and find out which form it has. Call it at start-up, before any training.

    Raises:
      ValueError: the file, module or function is not there, the function has neither form, or an option is
        not one of its parameters.
    """
    spec = as_spec(spec)
    function = _load(spec.path)
    try:
        parameters: Mapping[str, inspect.Parameter] = inspect.signature(function).parameters
    except ValueError:  # a function written in C that does not tell
        parameters = {}
    keywords = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    takes_columns = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    label = f"reward {spec.path!r} with parameters ({', '.join(map(str, parameters.values()))})"
    per_row, per_batch = "solution_str" in keywords, bool(_BATCH & set(keywords))
    if per_row == per_batch:
        raise ValueError(f"{label} has {'both forms' if per_row else 'neither form'}: {_SIGNATURES}")
    for option in spec.options:
        if option in _BATCH | {"solution_str"} or not (option in keywords or takes_columns):
            near = difflib.get_close_matches(option, keywords, n=1)
            raise ValueError(
                f"{label} does not take the option {option!r}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
    free = frozenset(keywords) - set(spec.options)
    return Reward(
        spec=spec,
        name=spec.name or spec.path.replace(":", ".").rpartition(".")[2],
        function=functools.partial(function, **spec.options),
        per_row=per_row,
        parameters=free,
        required=frozenset(name for name in free if keywords[name].default is inspect.Parameter.empty),
        takes_columns=takes_columns,
    )


def check_columns(reward: Reward, columns: Sequence[str]) -> None:
    """Make sure, before training, that the data has every column that a reward function needs.

    Raises:
      ValueError: naming the missing ones.
    """
    given = {"data_source", "solution_str", "extra_info"} if reward.per_row else _BATCH
    missing = reward.required - given - set(columns)
    if reward.per_row and {"answer", "reward_model"} & set(columns):
        missing -= {"ground_truth"}
    if missing:
        raise ValueError(
            f"reward {reward.name!r} needs the columns {sorted(missing)}; the data has {sorted(columns)}. "
            "Add them to the data or give them as options of the reward"
        )


def arguments(reward: Reward, batch: Batch, rows: Sequence[int]) -> dict[str, Any]:
    """Keyword arguments of one call: TRL's form for all of `rows`, verl's form for the single row in it.

    In TRL's form a completion is a string where its prompt is one, and `[{"role": "assistant", "content":
    …}]` where its prompt is a list of messages. In verl's form the ground truth is the column
    `ground_truth`, else `reward_model["ground_truth"]`, else `answer`.
    """

    def wanted(name: str) -> bool:
        return name in reward.parameters or (
            reward.takes_columns and name not in reward.spec.options and not reward.per_row
        )

    named = {
        name: column for name, column in batch.columns.items() if name not in _NOT_COLUMNS and wanted(name)
    }
    if not reward.per_row:
        values: dict[str, Any] = {name: [column[row] for row in rows] for name, column in named.items()}
        if wanted("prompts"):
            values["prompts"] = [batch.prompts[row] for row in rows]
        if wanted("completions"):
            values["completions"] = [
                text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
                for prompt, text in ((batch.prompts[row], batch.completions[row]) for row in rows)
            ]
        if wanted("completion_ids"):
            ids = (batch.completion_ids[row] for row in rows)
            values["completion_ids"] = [row.tolist() if hasattr(row, "tolist") else list(row) for row in ids]
        return values
    (row,) = rows
    item = {name: column[row] for name, column in batch.columns.items()}
    values = {name: item[name] for name in named} | {"solution_str": batch.completions[row]}
    values |= dict.fromkeys({"data_source", "extra_info"} & reward.required - set(values))
    if "ground_truth" in reward.parameters and values.get("ground_truth") is None:
        nested = (item.get("reward_model") or {}).get("ground_truth")
        if nested is not None or "answer" in item:
            values["ground_truth"] = item["answer"] if nested is None else nested
    return values
