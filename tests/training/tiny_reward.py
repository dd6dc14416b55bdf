"""A reward that differs within almost every group, also for an untrained policy."""


def score(prompts, completions, completion_ids, **columns):
    return [len(set(ids)) / 8 + text.count("1") for ids, text in zip(completion_ids, completions)]
