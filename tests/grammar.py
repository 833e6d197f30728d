"""Counts the samples that are problems of the built-in grammar, and is the oracle of the generator's tests.

    python sample.py --num_samples=200 | python tests/grammar.py

A sample parses if its question is a template, followed by equations with its operators and an answer. It is
right if every number is the one it should be."""

import re
import sys
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from prepare_data import NAMES, TEMPLATES, THINGS

TEXT = re.compile(
    r"Question: (?P<question>.+) Answer: (?P<thoughts><<[^<>]+>>(?: <<[^<>]+>>)*) #### (?P<answer>\d+)"
)
EQUATION = re.compile(r"<<(\d+)([-+*/])(\d+)=(\d+)>>")


def question_pattern(template):
    kinds = {"name": "|".join(NAMES), "friend": "|".join(NAMES), "things": "|".join(THINGS)}
    kinds |= dict.fromkeys("abc", r"\d+")
    seen, pattern = set(), ""
    for part in re.split(r"(\{\w+\})", template):
        key = part.strip("{}")
        if part == key:
            pattern += re.escape(part)
        else:
            pattern += f"(?P={key})" if key in seen else f"(?P<{key}>{kinds[key]})"
            seen.add(key)
    return re.compile(pattern)


PATTERNS = [(question_pattern(question), equations) for question, *equations in TEMPLATES]


def check(text):
    """'right', 'parses' or 'no'."""
    match = TEXT.fullmatch(text)
    if match is None:
        return "no"
    equations = EQUATION.findall(match["thoughts"])
    for pattern, wanted in PATTERNS:
        question = pattern.fullmatch(match["question"])
        if question and [operator for _, operator, _, _ in equations] == [w[1] for w in wanted]:
            break
    else:
        return "no"
    values = {key: Fraction(number) for key, number in question.groupdict().items() if key in "abc"}
    for (left, operator, right, result), (p, _, q) in zip(equations, wanted):
        left, right, result = Fraction(left), Fraction(right), Fraction(result)
        results = {"+": left + right, "-": left - right, "*": left * right}
        results["/"] = left / right if right else None
        if (left, right, result) != (values[p], values[q], results[operator]):
            return "parses"
        values["x"] = result
    return "right" if Fraction(match["answer"]) == values["x"] else "parses"


if __name__ == "__main__":
    verdicts = [check(sample.strip()) for sample in sys.stdin.read().split("---\n")]
    right, parses = verdicts.count("right"), verdicts.count("parses")
    print(f"of {len(verdicts)} samples {right + parses} parse, {right} of them with every number right")
