"""What a result says, in sentences: is the rootstock worth it?"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Result = Mapping[str, Any]
SAME_SIZE = 1.02  # of the rootstock's bytes: equal parameters in a few more nodes count as equal
DONORS = ("fine-tuned donor", "donor, last layer")


@dataclass(frozen=True)
class Verdict:
    """Attributes: pays: no baseline of its size is as good. sentences: for a reader."""

    pays: bool
    sentences: tuple[str, ...]


def judge(result: Result) -> Verdict:
    """Compare the rootstock with the donor, and with every baseline whose file is no larger.

    One that lies above the 95 % interval of the rootstock's test accuracy says that grafting does
    not pay; one inside of it leaves the question open.
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
        if numbers.get("test_accuracy") is not None
        and numbers.get("bytes", float("inf")) <= SAME_SIZE * size
    }
    if not rivals:
        return Verdict(
            False, (first, "No baseline of its size was run: whether grafting pays is open.")
        )
    name, best = max(rivals.items(), key=lambda rival: rival[1]["test_accuracy"])
    share = best["test_accuracy"]
    told = f"{name} ({megabytes(best['bytes'])} MB) reaches {percent(share)} %"
    if share > high:
        return Verdict(False, (first, f"Grafting does not pay here: {told}, above the interval."))
    if share >= low:
        return Verdict(
            share < own, (first, f"Of the baselines of its size, {told}, within the interval.")
        )
    return Verdict(True, (first, f"Grafting pays here: of the baselines of its size, {told}."))


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
