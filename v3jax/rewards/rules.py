"""Rules that say whether an answer is right, by its text and a reference (report section 5.2.1)."""

import re
from collections.abc import Callable

Rule = Callable[[str, str], bool]
"""`(text, reference) -> right`."""

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def exact(text: str, reference: str) -> bool:
    """The reference and nothing else, white space around it aside."""
    return text.strip() == reference.strip()


def final_number(text: str, reference: str) -> bool:
    """The last number in the text is the last one in the reference."""
    said, wanted = (_NUMBER.findall(t.replace(",", "")) for t in (text, reference))
    return bool(said and wanted) and float(said[-1]) == float(wanted[-1])


RULES: dict[str, Rule] = {"exact": exact, "final_number": final_number}


def rule_named(name: str) -> Rule:
    """The rule of that name.

    Raises:
      ValueError: there is none.
    """
    if name not in RULES:
        raise ValueError(f"rule: no {name!r}; there are {', '.join(RULES)}")
    return RULES[name]
