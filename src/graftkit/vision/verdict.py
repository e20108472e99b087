"""What a result says, in sentences: is the rootstock worth it?"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Result = Mapping[str, Any]
SAME_SIZE = 1.02  # of the rootstock's bytes: equal parameters in a few more nodes count as equal
DONORS = ("fine-tuned donor", "donor, last layer")


@dataclass(frozen=True)
class Verdict:
    """Attributes: pays: every baseline of its size is clearly worse. sentences: for a reader."""

    pays: bool
    sentences: tuple[str, ...]


def judge(result: Result) -> Verdict:
    """Compare the rootstock with the donor, and with every baseline whose file is no larger.

    The best of these decides, by the rootstock's lead in test accuracy: where the lead's 95 %
    interval is above 0 grafting pays, below 0 it does not, and otherwise the question is open.
    """
    own, size = result.get("test_accuracy"), result.get("bytes")
    if own is None or size is None:
        return Verdict(False, ("The rootstock was not measured on test images.",))
    low, high = result.get("test_interval") or (own, own)
    first = (
        f"The rootstock has {megabytes(size)} MB and reaches {percent(own)} % "
        f"[{percent(low)}, {percent(high)}] on the test images{_against_donor(result)}."
    )
    rivals = {
        name: numbers
        for name, numbers in result.get("baselines", {}).items()
        if numbers.get("lead_interval") is not None
        and numbers.get("bytes", float("inf")) <= SAME_SIZE * size
    }
    if not rivals:
        return Verdict(
            False, (first, "No baseline of its size was run: whether grafting pays is open.")
        )
    name, best = min(rivals.items(), key=lambda rival: rival[1]["lead"])
    low, high = best["lead_interval"]
    if low > 0:
        word = "pays here"
    elif high < 0:
        word = "does not pay here"
    else:
        word = "may or may not pay here"
    told = (
        f"Grafting {word}: of the baselines of its size, {name} ({megabytes(best['bytes'])} MB) "
        f"comes nearest with {percent(best['test_accuracy'])} %; the rootstock's lead is "
        f"{100 * best['lead']:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]."
    )
    return Verdict(low > 0, (first, told))


def reference_donor(result: Result) -> tuple[str, Result]:
    """Name and numbers of the whole donor's classifier: fine-tuned where it was. Or "" and {}."""
    baselines = result.get("baselines", {})
    name = next((name for name in DONORS if name in baselines), "")
    return name, baselines.get(name, {})


def percent(share: float) -> str:
    """A share between 0 and 1 in per cent, with one digit."""
    return f"{100 * share:.1f}"


def megabytes(count: float) -> str:
    """Bytes in units of 10⁶."""
    return f"{count / 1e6:.2f}"


def _against_donor(result: Result) -> str:
    name, donor = reference_donor(result)
    if donor.get("test_accuracy") is None or donor.get("bytes") is None:
        return ""
    return (
        f"; the {name} of {megabytes(donor['bytes'])} MB reaches "
        f"{percent(donor['test_accuracy'])} %"
    )
