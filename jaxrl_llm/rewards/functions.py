"""Built-in reward functions, named in `REWARDS`.

They run in the worker processes of `jaxrl_llm.rewards.pool`, one completion or one batch at a time, and so
need no timeouts of their own. Host libraries are imported inside the functions that use them; `IMPORTS`
says which, so that a worker can load them before its first call.
"""

import functools
import logging
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Completion = str | Sequence[Mapping[str, Any]]

_LATEX = ("$", r"\(", r"\[", r"\boxed")
_LONGEST_BARE_FORMULA = 200  # characters


def completion_text(completion: Completion) -> str:
    """The text of a completion: itself, or the content of its last message in conversational form."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def tagged(text: str, tag: str | None) -> str:
    """The stripped content of the last `<tag>…</tag>` in `text`, "" without one; all of it for tag None."""
    if tag is None:
        return text.strip()
    found = re.findall(rf"<{re.escape(tag)}>(.*?)</{re.escape(tag)}>", text, flags=re.DOTALL)
    return found[-1].strip() if found else ""


@functools.lru_cache(maxsize=64)
def _scorer(task: str, pickled_config: bytes) -> Callable[..., float]:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, **pickle.loads(pickled_config)).score_answer


def reasoning_gym(
    solution_str: str,
    source_dataset: str,
    entry: Mapping[str, Any] | None,
    task_config: Mapping[str, Any] | None = None,
    tag: str | None = None,
) -> float | None:
    """The `reasoning_gym` task's own `score_answer`, which may give partial credit.

    Args:
      solution_str: the completion.
      source_dataset: name of the task, e.g. "chain_sum" (column).
      entry: the task's item, with "question", "answer" and "metadata" (column).
      task_config: options of the task (column); None = its defaults.
      tag: take the answer from the last `<tag>…</tag>`; None takes the whole completion.

    Returns:
      the score, in [0, 1] for most tasks; None for a row without an entry.
    """
    if entry is None:
        return None
    config = pickle.dumps(dict(task_config or {}))  # a key that keeps tuples and lists apart
    return float(_scorer(source_dataset, config)(tagged(solution_str, tag), entry))


def exact_match(solution_str: str, ground_truth: Any, tag: str | None = None) -> float | None:
    """1.0 where the stripped completion equals the stripped ground truth as text, otherwise 0.0.

    `tag` takes the answer from the last `<tag>…</tag>` instead of the whole completion. None for a row
    without a ground truth.
    """
    if ground_truth is None:
        return None
    return float(tagged(solution_str, tag) == str(ground_truth).strip())


def math_equivalence(solution_str: str, ground_truth: Any) -> float | None:
    r"""1.0 where the completion's last formula is equal to the ground truth (by math-verify), otherwise 0.0.

    1/2, 0.5 and \frac{1}{2} are equal; [0, 1] and (0, 1) are not. The ground truth is a bare answer or
    LaTeX; the completion is prose with LaTeX, \boxed{} or plain numbers, or a bare formula. None for a row
    without a ground truth.

    Raises:
      ValueError: the ground truth is not mathematics.
    """
    if ground_truth is None:
        return None
    from math_verify import parse, verify

    # It warns of the missing timeout: the deadline is the worker's, since its own alarms fail in threads.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    truth = str(ground_truth).strip()
    delimited = any(mark in truth for mark in _LATEX)
    gold = parse(truth if delimited else f"${truth}$", parsing_timeout=None)
    if not gold:
        raise ValueError(f"the ground truth {truth!r} is not mathematics that math-verify can read")
    text = solution_str.strip()
    answer = parse(text, parsing_timeout=None)
    if not answer and 0 < len(text) <= _LONGEST_BARE_FORMULA and "$" not in text:
        answer = parse(f"${text}$", parsing_timeout=None)
    return float(verify(gold, answer, timeout_seconds=None))


def format_regex(
    completions: Sequence[Completion], pattern: str | Sequence[str | None]
) -> list[float | None]:
    """1.0 where the whole completion matches a regular expression (`re.fullmatch`), otherwise 0.0.

    Args:
      completions: N completions.
      pattern: one expression for all rows (an option), or N of them (a column; None = not applicable).
        `.` does not match a newline unless the expression starts with `(?s)`.
    """
    patterns = [pattern] * len(completions) if isinstance(pattern, str) else pattern
    return [
        None
        if expression is None
        else float(re.fullmatch(expression, completion_text(completion)) is not None)
        for completion, expression in zip(completions, patterns, strict=True)
    ]


def overlong_penalty(
    completion_ids: Sequence[Sequence[int]], max_completion_length: int, buffer: int
) -> list[float]:
    """DAPO's soft overlong punishment (arXiv:2503.14476).

    With L = `max_completion_length` and c = `buffer`, both in tokens: 0 up to L − c, then
    (L − c − length) / c, which is −1 at L, and −1 beyond.

    Raises:
      ValueError: not 0 < buffer <= max_completion_length.
    """
    if not 0 < buffer <= max_completion_length:
        raise ValueError(
            f"overlong_penalty needs 0 < buffer <= max_completion_length, got buffer={buffer} and "
            f"max_completion_length={max_completion_length}"
        )
    start = max_completion_length - buffer
    return [max(-1.0, min(0.0, (start - len(ids)) / buffer)) for ids in completion_ids]


REWARDS: dict[str, Callable[..., Any]] = {
    "exact_match": exact_match,
    "format_regex": format_regex,
    "math_equivalence": math_equivalence,
    "overlong_penalty": overlong_penalty,
    "reasoning_gym": reasoning_gym,
}

IMPORTS: dict[str, tuple[str, ...]] = {
    "math_equivalence": ("math_verify",),
    "reasoning_gym": ("reasoning_gym",),
}
