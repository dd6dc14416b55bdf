r"""Evaluates a policy on the held-out problems of a config.

    python -m jaxrl_llm.evaluate --config=configs/quickstart.py --workdir=runs/quickstart
    python -m jaxrl_llm.evaluate --config=configs/grpo.py:path/to/model --config.eval.num_generations=8

With a workdir its newest checkpoint is taken (or that of --step), without one the params that training would
start from. Prints accuracy with its 95% interval and, for several samples a problem, pass@k and maj@k.
"""

import json
from pathlib import Path

from absl import flags as absl_flags

from jaxrl_llm import flags

absl_flags.adopt_module_key_flags(flags)

_STEP = absl_flags.DEFINE_integer("step", None, "Step of the checkpoint; none = the newest.")
_OUT = absl_flags.DEFINE_string("out", None, "File to write the figures to, as JSON.")


def main(argv: list[str]) -> None:
    import jax

    from jaxrl_llm.rewards.pool import RewardPool
    from jaxrl_llm.sampling.autoregressive import prepare
    from jaxrl_llm.training import job as jobs
    from jaxrl_llm.training.checkpoints import CheckpointError
    from jaxrl_llm.training.evaluation import evaluate
    from jaxrl_llm.training.progress import progress, summary

    out = Path(_OUT.value).expanduser() if _OUT.value else None
    try:
        if out is not None and not out.absolute().parent.is_dir():
            raise FileNotFoundError(f"--out={out}: there is no folder {out.absolute().parent}")
        job = jobs.build(flags.config(), training=False)
        if not job.eval_prompts:
            raise ValueError(
                "the config has no held-out problems: set eval.data.kind, and eval.data.path of a file"
            )
        params, step = jobs.policy_params(job, flags.workdir(), _STEP.value)
    except (ValueError, FileNotFoundError, CheckpointError) as error:
        flags.fail(error)
    c = job.config
    with (
        jax.set_mesh(job.mesh),
        RewardPool(
            jobs.reward_specs(c),
            workers=c.reward.workers,
            timeout=c.reward.timeout,
            memory_gib=c.reward.memory_gib,
        ) as pool,
        progress(total=len(job.eval_prompts), title="problems") as tick,
    ):
        metrics, _, _ = evaluate(
            prepare(params, job.cfg, job.dtype),
            job.cfg,
            job.tokenizer,
            job.eval_prompts,
            job.eval_settings(),
            pool,
            job.weights,
            key=jobs.run_key(job, jobs.EVALUATE, 0),
            batch_prompts=c.eval.batch_prompts,
            correct_at=c.eval.correct_at,
            rules=job.rules,
            tick=lambda done: tick(done, {}),
        )
    source = "the initial params" if step is None else f"step {step}"
    summary(list(metrics.items()), title=f"{len(job.eval_prompts)} held-out problems, {source}")
    if out is not None:
        out.write_text(json.dumps({"step": step} | metrics, indent=2) + "\n")


if __name__ == "__main__":
    flags.run(main, required=("config",))
