"""Decoding of masked diffusion models in plain numpy, a row at a time, from the papers' own words.

It shares nothing with the product but names of options. Everything is greedy: draws are tested by frequency.
`decode(predict, prompt, **options)` calls `predict(ids) -> [L, V]` for every forward pass and counts them.
With a cache it calls `predict(ids, low, high)` for a pass over columns low to high - 1, while the others are
as they were in the last pass over the whole row; `other`, a predictor of its own, is called for the negative
input in the same way.
"""

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np

DEFAULTS = {
    "block_size": None,
    "family": "llada",
    "order": "low_confidence",
    "commit": "quota",
    "guidance": "none",
    "detector": "resolve",
    "detector_scope": "committed",
    "negative_prompt": "keep",
    "confidence_from": "guided",
    "accelerate": False,
    "tracked": 8,
    "max_informative": None,
    "allow_mask_proposal": False,
    "cache": "none",
    "steps": None,
    "top_p": 1.0,
    "top_k": 0,
    "threshold": 0.9,
    "factor": 1.0,
    "entropy_bound": 0.1,
    "guidance_weight": 0.5,
    "guidance_end": None,
    "informative_share": 0.3,
    "radius": 4,
    "plausible": 0.0,
    "change_limit": 0.1,
    "patience": 1,
    "stable_steps": 2,
    "stable_probability": 0.9,
    "window": 16,
    "skip_negative": True,
    "eos_id": None,
    "eot_id": None,
    "forbid_eos": False,
    "distrust_eos": False,
    "stop_at_eos": False,
    "lexical": (),
}


def softmax(x):
    x = np.exp(np.asarray(x, np.float64) - np.max(x))
    return x / x.sum()


def js(p, q):
    p, q = ([*x, max(1 - sum(x), 0)] for x in (p, q))
    total = 0.0
    for a, b in zip(p, q):
        for x in (a, b):
            if x > 0:
                total += 0.5 * x * math.log(x / (0.5 * (a + b)))
    return min(max(total, 0), math.log(2))


def top(scores, count):
    """The best `count` keys of a dict, the lower first where equal."""
    return sorted(scores, key=lambda j: (-scores[j], j))[:count]


def dream_share(step, steps):
    """1 - t_{i+1} / t_i of torch.linspace(1, 1e-3, steps + 1) in float32; 1 at the end."""
    if step == steps - 1:
        return np.float32(1)

    def t(i):
        width = (np.float32(1e-3) - np.float32(1)) / np.float32(steps)
        if i < (steps + 1) // 2:
            return np.float32(1) + width * np.float32(i)
        return np.float32(1e-3) - width * np.float32(steps - i)

    return np.float32(1) - t(step + 1) / t(step)


def filtered(logits, o):
    """Top-k, then the smallest set of at least top_p of the mass."""
    order = sorted(range(len(logits)), key=lambda v: (-logits[v], v))
    if o.top_k:
        order = order[: o.top_k]
    if o.top_p < 1:
        probs = softmax([logits[v] for v in order])
        order = order[: int(np.searchsorted(np.cumsum(probs), o.top_p)) + 1]
    out = np.full(len(logits), -np.inf)
    out[order] = logits[order]
    return out


def decode(predict, prompt, mask, size, other=None, **options):
    """The response of one prompt and its trace: tokens, commit_step, raw_logp, steps, nfe, margin.

    The margin is the least distance by which anything was decided: tokens, order, thresholds.
    """
    o = SimpleNamespace(**(DEFAULTS | options))
    block_size = o.block_size or size
    blocks = size // block_size
    steps = (o.steps or size) // blocks
    start = len(prompt)
    x = np.array([*prompt, *[mask] * size])
    commit_step, raw, blank_score = [-1] * size, [0.0] * size, [0.0] * size
    kept, change, peak, stable, best = {}, {}, [0.0] * size, [0] * size, [None] * size
    calm, ahead, margin, rounds, nfe = 0, False, math.inf, 0, 0
    banned = [] if o.allow_mask_proposal else [mask]
    banned += [o.eos_id] if o.forbid_eos else []
    eos = -1 if o.eos_id is None else o.eos_id

    def run(*args, by=predict):
        nonlocal nfe
        nfe += 1
        return np.asarray(by(*args), np.float64)[start:]

    def masks(low, high):
        return [j for j in range(low, high) if x[start + j] == mask]

    def allowed(logits):
        logits = logits.copy()
        logits[banned] = -np.inf
        return logits

    def informative(low, high):
        own = [j for j in range(size) if x[start + j] != mask]
        if o.detector_scope == "block":
            own = [j for j in own if low <= j < high]
        if not own:
            return []
        scores = {}
        for j in own:
            if o.detector == "early":
                near = [i for i in range(size) if 0 < abs(i - j) <= o.radius]
                when = [commit_step[i] if commit_step[i] >= 0 else rounds + 1 for i in near]
                scores[j] = sum(when) / max(len(when), 1) - commit_step[j]
            elif o.detector == "resolve":
                scores[j] = peak[j]
            elif o.detector == "settle":
                scores[j] = -change.get(j, math.log(2))
            elif o.detector == "pmi":
                scores[j] = blank_score[j]
            elif x[start + j] in o.lexical:
                scores[j] = 0.0
        count = min(max(1, math.ceil(o.informative_share * len(own) - 1e-4)), len(own))
        return top(scores, min(count, o.max_informative or size))

    if o.guidance == "high_information" and o.detector == "pmi":
        blank = run(x)
    block, step, done = 0, 0, False
    while not done:
        low, high = block * block_size, (block + 1) * block_size
        todo = masks(0, high)
        own = [j for j in range(size) if x[start + j] != mask]
        end = o.guidance_weight if o.guidance_end is None else o.guidance_end
        weight = o.guidance_weight + (end - o.guidance_weight) * len(own) / size
        window = (start + low, start + (high if o.cache == "dual" else size))
        if o.cache == "none" or step == 0:
            window = ()
        logits = run(x, *window)

        # which committed tokens the negative input hides
        hide = []
        if o.guidance == "high_information":
            hide = informative(low, high)
        if o.guidance == "low_confidence" and own:
            sure = {j: -softmax(logits[j]).max() for j in own}
            count = min(max(1, math.floor(o.informative_share * len(own) + 1e-4)), len(own))
            hide = top(sure, count)
        hide_prompt = o.guidance == "prompt"
        was_converged = o.accelerate and calm >= o.patience
        negative = None
        asked = weight > 0 or (o.cache != "none" and max(o.guidance_weight, end) > 0)
        if asked and (hide or hide_prompt) and not (o.skip_negative and was_converged):
            hidden = x.copy()
            if hide_prompt or o.negative_prompt == "mask":
                hidden[:start] = mask
            hidden[[start + j for j in hide]] = mask
            negative = run(hidden, *window, by=other or predict)

        # how predictions have changed where they are looked at
        if o.accelerate or (o.guidance == "high_information" and o.detector in ("resolve", "settle")):
            looked = set(range(low, high))
            if o.detector == "settle" or (o.accelerate and o.max_informative is None):
                looked = set(range(size))
            elif o.accelerate:
                looked |= set(hide)
            for j in looked:
                p = softmax(allowed(logits[j]))
                if j in kept:
                    ids, before = kept[j]
                    change[j] = js(p[ids], before)
                    if x[start + j] == mask:
                        peak[j] = max(peak[j], change[j])
                ids = top(dict(enumerate(p)), min(o.tracked, len(p)))
                stable[j] = stable[j] + 1 if ids[0] == best[j] else 1
                kept[j], best[j] = (ids, p[ids]), ids[0]
        if o.accelerate:
            moved = np.mean([change.get(j, math.log(2)) for j in hide]) if hide else math.inf
            margin = min(margin, abs(moved - o.change_limit))
            agree = all(best[j] == x[start + j] for j in hide)
            calm = calm + 1 if hide and moved < o.change_limit and agree else 0
        converged = o.accelerate and calm >= o.patience
        if o.skip_negative and converged:
            negative = None

        # a proposal for every candidate
        token, confidence, probability = {}, {}, {}
        for j in todo:
            plain = logits[j]
            final = plain if negative is None else plain + weight * (plain - negative[j])
            final = allowed(final)
            if o.plausible > 0:
                final[plain < allowed(plain).max() + math.log(o.plausible)] = -np.inf
            judged = final if o.confidence_from == "guided" else allowed(plain)
            if o.family == "dream":
                final, judged = filtered(final, o), filtered(judged, o)
            token[j] = int(np.argmax(final))
            second = np.sort(final)[-2]
            margin = min(margin, final[token[j]] - second)
            judged = judged.copy()
            if o.distrust_eos:
                judged[[i for i in (o.eos_id, o.eot_id) if i is not None]] = -np.inf
            p = softmax(judged)
            probability[j] = confidence[j] = p[token[j]]
            if o.order == "topk_margin":
                confidence[j] = np.sort(p)[-1] - np.sort(p)[-2]
            elif o.order == "entropy":
                confidence[j] = float(np.sum(p * np.log(p + 1e-10)))

        # which of them to commit
        ranked = top(confidence, len(todo))
        in_order = [confidence[j] for j in ranked]
        gaps = [a - b for a, b in pairwise(in_order)]
        if o.commit == "quota" and o.family == "llada":
            count = block_size // steps + (step < block_size % steps)
        elif o.commit == "quota":
            count = int(np.float32(len(todo)) * dream_share(step, steps))
            count = max(count, int(ahead))  # a row ahead of its grid does not wait for it
        elif o.commit == "threshold":
            count = max(1, sum(c >= o.threshold for c in in_order))
            margin = min([margin, *(abs(c - o.threshold) for c in in_order)])
        else:
            count, spent = 1, 0.0
            for r in range(2, len(todo) + 1):
                spent -= in_order[r - 2]
                left = o.entropy_bound - spent
                if o.commit == "factor":
                    left = o.factor - (r + 1) * (1 - in_order[r - 1])
                margin = min(margin, abs(left))
                if left < 0:
                    break
                count = r
        now = ranked[:count]
        if o.cache != "none" and o.family == "dream" and step == 0 and (o.commit != "quota" or steps > 1):
            now = [low]
        if 0 < count < len(ranked) and gaps[count - 1] > 0:  # equal ones have an order too
            margin = min(margin, gaps[count - 1])
        if o.accelerate and converged:
            inside = masks(low, high)
            centres = [*own, inside[0]]
            for j in todo:
                near = min(abs(j - c) for c in centres) <= o.window
                margin = min(margin, abs(probability[j] - o.stable_probability))
                sure = stable[j] >= o.stable_steps and probability[j] >= o.stable_probability
                if near and sure and j not in now:
                    now.append(j)
                    ahead = True
        for j in set(now):
            if token[j] != mask:
                x[start + j], commit_step[j] = token[j], rounds
                raw[j] = math.log(softmax(logits[j])[token[j]])
                if o.guidance == "high_information" and o.detector == "pmi":
                    blank_score[j] = raw[j] - math.log(softmax(blank[j])[token[j]])
        rounds, step = rounds + 1, step + 1
        full = not masks(low, high)
        if o.commit == "quota":
            full = step == steps if o.allow_mask_proposal else full or step == steps
        if full:
            block, step, ahead = block + 1, 0, False
        response = list(x[start:])
        ended = eos in response and mask not in response[: response.index(eos)]
        done = block == blocks or (o.stop_at_eos and ended)
    response = [eos if o.stop_at_eos and ended and t == mask else int(t) for t in response]
    return SimpleNamespace(
        tokens=response, commit_step=commit_step, raw_logp=raw, steps=rounds, nfe=nfe, margin=margin
    )
