"""Rewards that go wrong on some rows; what is right can be worked out from the dumped completions."""

import time

BROKEN = ("raise", "nan", "inf", "hang")


def is_chosen(completion):
    return len(completion) % 2 == 0


def shaped(completions, trouble):
    """A quarter per character, except where the row's `trouble` says otherwise."""
    scores = []
    for text, what in zip(completions, trouble):
        score = len(text) / 4
        if what == "equal":
            score = 0.25
        elif is_chosen(text):
            if what == "raise":
                raise ZeroDivisionError
            if what == "hang":
                time.sleep(3600)
            score = {"none": None, "nan": float("nan"), "inf": float("inf"), "huge": -1e8}.get(what, score)
        scores.append(score)
    return scores


def bonus(completions, trouble):
    """For a digit 1; not applicable to rows with trouble "none"."""
    return [None if what == "none" else float("1" in text) for text, what in zip(completions, trouble)]


def constant(completions):
    return [0.7] * len(completions)
