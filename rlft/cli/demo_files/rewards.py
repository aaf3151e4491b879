"""The reward of the demo: a function that gets all completions of a step, and every column of the data by its name."""

import re


def correct(completions, answer, **columns):
    """1 where the last number of a completion is the answer, else 0."""
    return [float((re.findall(r"-?\d+", text) or [""])[-1] == right) for text, right in zip(completions, answer)]
