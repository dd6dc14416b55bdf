"""How `sample` samples from a masked diffusion model: the response fills where the model is surest."""

import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from ml_collections import ConfigDict
from rich.console import Console
from rich.live import Live
from rich.text import Text

from jaxrl_llm.data import tokenizers
from jaxrl_llm.data.prompts import Prompt, pad
from jaxrl_llm.models import huggingface, huggingface_config
from jaxrl_llm.models.denoiser import prepare
from jaxrl_llm.models.huggingface_diffusion import special_ids
from jaxrl_llm.sampling.diffusion import decode, rounds
from jaxrl_llm.sampling.diffusion_options import Method, settings
from jaxrl_llm.sampling.diffusion_state import Decoded, of_model
from jaxrl_llm.training import heat_map
from jaxrl_llm.training.job import load_tokenizer

COLUMNS = 64
"""Prompts asked for one by one are padded to a multiple of this, so that few programs are compiled."""

MASKED = "░"
FAILED = "the model gave NaN"


class Diffusion:
    """A masked diffusion model, its decoder, and what it wrote last.

    `load` it before use; completions of a prompt are numbered from a uid.
    """

    def __init__(self, config: ConfigDict, count: int) -> None:
        """Checks the config, of `configs/diffusion.py`, and opens all but the weights.

        Args:
          count: completions per prompt.

        Raises:
          ValueError, FileNotFoundError: what is wrong, by key or by file.
        """
        if not config.model.path:
            raise ValueError("model.path is empty: --config=configs/diffusion.py:path/to/model")
        if config.data.max_prompt_length < 1:
            raise ValueError(f"data.max_prompt_length={config.data.max_prompt_length}: at least 1")
        if config.model.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"model.compute_dtype={config.model.compute_dtype!r}: float32 or bfloat16")
        self._count = count
        self._folder = Path(config.model.path).expanduser()
        self._dtype = jnp.dtype(config.model.compute_dtype)
        self._key = jax.random.key(config.seed)
        transformers.logging.set_verbosity_error()  # it says that it does not know these families
        self.tokenizer = load_tokenizer(config)
        self.max_prompt_length = int(config.data.max_prompt_length)
        self._cfg = huggingface_config.config_from_folder(self._folder)
        tokenizers.check_vocabulary(self.tokenizer, self._cfg.vocab_size)
        self._denoiser = of_model(self._cfg, self._dtype)
        self.mask_id = self._denoiser.mask_id
        options = config.method.to_dict()
        options["family"] = options["family"] or self._cfg.family.lower()
        self._method = Method(**options)
        special = special_ids(self._folder)
        eos = self.tokenizer.eos_ids[0] if special.eos is None else special.eos
        self._ends = [eos, *self.tokenizer.eos_ids, *([] if special.eot is None else [special.eot])]
        self._numbers = config.settings.to_dict() | {"eos_id": eos, "eot_id": special.eot}
        settings(self._method, 1, **self._numbers)  # says now what is wrong with them
        self._lexical = self._informative(config.lexical)
        self._last: list[heat_map.Trace] = []

    def load(self, workdir: Path | None, step: int | None, slots: int) -> None:
        """Reads the weights.

        Args:
          workdir, step: must be None: a run leaves its model as a folder.
          slots: completions decoded side by side.

        Raises:
          ValueError, FileNotFoundError: as `huggingface.load`.
        """
        if workdir is not None or step is not None:
            raise ValueError(
                "a diffusion config takes no --workdir and no --step: give the run's folder export as "
                "--config=configs/diffusion.py:path/to/run/export"
            )
        self._slots = slots
        params = huggingface.load(self._folder, self._cfg, dtype=self._dtype)
        self._params = prepare(params, self._cfg, self._dtype)

    def columns(self, prompts: Sequence[Prompt]) -> Iterator[dict[str, Any]]:
        """What each prompt's row gets, as soon as it and those before it are done."""
        self._last = []
        width = max((len(prompt.ids) for prompt in prompts), default=1)
        own: list[dict[str, Any]] = []
        for row in self._completions(prompts, [p.index * self._count for p in prompts], width):
            self._keep(row)
            own.append(self._row(row))
            if len(own) == self._count:
                yield {name: [completion[name] for completion in own] for name in own[0]}
                own.clear()

    def texts(self, prompt: Prompt, uid: int) -> Iterator[tuple[str, str]]:
        """(text, error) of each completion."""
        self._last = []
        for row in self._completions([prompt], [uid], _rounded(prompt)):
            self._keep(row)
            yield self._text(row), FAILED if row.failed else ""

    def show(self, prompt: Prompt, uid: int) -> None:
        """Prints the completions, each after it was seen to fill, redrawn round by round."""
        console = Console(highlight=False)
        self._last = []
        for i in range(self._count):
            with Live(console=console, transient=True, auto_refresh=False) as live:
                for decoded in rounds(**self._arguments([(prompt.ids, uid + i)], _rounded(prompt))):
                    row = _row_of(jax.device_get(decoded), 0)
                    live.update(self._canvas(row), refresh=True)
            self._keep(row)
            print(self._text(row), flush=True)
            if row.failed:
                print(f"not sampled: {FAILED}", file=sys.stderr)

    def draw(self, path: Path) -> None:
        """Writes a heat map of what was written last."""
        heat_map.save(self._last, path)

    def _arguments(self, rows: Sequence[tuple[list[int], int]], width: int) -> dict[str, Any]:
        """Of `decode` and `rounds`, for rows of (ids, uid) padded to `width`."""
        prompts, lengths = pad([ids for ids, _ in rows], length=width)
        return {
            "denoiser": self._denoiser,
            "params": self._params,
            "prompts": prompts,
            "lengths": lengths,
            "method": self._method,
            "settings": settings(self._method, len(rows), **self._numbers),
            "key": self._key,
            "uids": jnp.array([uid % 2**31 for _, uid in rows]),
            "lexical": self._lexical,
        }

    def _completions(self, prompts: Sequence[Prompt], uids: Sequence[int], width: int) -> Iterator[Decoded]:
        """Of each prompt its completions in order, one row each, as numpy."""
        wanted = [(prompt.ids, uid + i) for prompt, uid in zip(prompts, uids) for i in range(self._count)]
        slots = min(self._slots, len(wanted))
        for start in range(0, len(wanted), max(1, slots)):
            own = wanted[start : start + slots]
            filled = own + own[-1:] * (slots - len(own))  # one shape, one program
            decoded = jax.device_get(decode(**self._arguments(filled, width)))
            for i in range(len(own)):
                yield _row_of(decoded, i)

    def _keep(self, row: Decoded) -> None:
        """For `draw`."""
        if len(self._last) < heat_map.MOST:
            labels = [self.tokenizer.decode([token]) for token in row.tokens.tolist()]
            self._last.append(heat_map.Trace(labels, np.asarray(row.commit_step), int(row.nfe)))

    def _canvas(self, row: Decoded) -> Text:
        """The response as it is: what was committed in the last round in bold, masks in grey."""
        text, ids = Text(), row.tokens
        last = int(row.steps) - 1
        kinds = np.where(ids == self.mask_id, 0, np.where(row.commit_step == last, 1, 2))
        cuts = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(ids)]
        for start, end in itertools.pairwise(cuts):
            if kinds[start] == 0:
                text.append(MASKED * (end - start), style="bright_black")
            else:
                written = self.tokenizer.decode(ids[start:end].tolist())
                text.append(written, style="bold green" if kinds[start] == 1 else "")
        filled = int(np.sum(kinds > 0))
        state = f"round {int(row.steps)}, {int(row.nfe)} passes, {filled} of {len(ids)} tokens"
        return text.append(f"\n{state}", style="dim")

    def _informative(self, pattern: str) -> jax.Array | None:
        """bool[V] of tokens whose text has a match, for detector='lexical'."""
        method = self._method
        if (method.guidance == "high_information" and method.detector == "lexical") != bool(pattern):
            raise ValueError(
                f"lexical={pattern!r}: method.guidance='high_information' with method.detector='lexical' "
                "needs a regular expression, and nothing else takes one"
            )
        if not pattern:
            return None
        try:
            found = [
                bool(t and re.search(pattern, t.decode(errors="replace")))
                for t in self.tokenizer.token_bytes()
            ]
        except re.error as error:
            raise ValueError(f"lexical={pattern!r} is no regular expression: {error}") from error
        return jnp.asarray(found + [False] * (self._cfg.vocab_size - len(found)))

    def _text(self, row: Decoded) -> str:
        """Up to the first token that ends a text or a message."""
        ids = np.asarray(row.tokens).tolist()
        end = next((i for i, token in enumerate(ids) if token in self._ends), len(ids))
        return self.tokenizer.decode([token for token in ids[:end] if token != self._denoiser.mask_id])

    def _row(self, row: Decoded) -> dict[str, Any]:
        return {
            "completions": self._text(row),
            "completion_ids": row.tokens.tolist(),
            "commit_steps": row.commit_step.tolist(),
            "behaviour_logp": row.commit_logp.tolist(),
            "raw_logp": row.raw_logp.tolist(),
            "steps": int(row.steps),
            "nfe": int(row.nfe),
            "reasons": "failed" if row.failed else "stop" if row.finished else "length",
        }


def _row_of(decoded: Decoded, i: int) -> Decoded:
    """Row i of what was decoded, as numpy."""
    return jax.tree.map(lambda x: x[i], decoded)


def _rounded(prompt: Prompt) -> int:
    return -(-len(prompt.ids) // COLUMNS) * COLUMNS
