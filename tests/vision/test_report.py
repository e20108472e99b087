"""The page: its verdict, its numbers, and what hostile or missing parts of a result do to it."""

import base64
import io
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from graftkit.errors import OutputError
from graftkit.vision.report import headline, render_page, write_report
from graftkit.vision.results import _runs, judge

OWN = 0.912  # the rootstock's accuracy
HOSTILE = '<script>alert("1")</script>\'&$\\frac{\x00\udcff\u202e麦'


def numbers(accuracy: float, size: int = 500_000) -> dict[str, Any]:
    ahead = OWN - accuracy
    return {
        "lead": ahead,
        "lead_interval": [ahead - 0.02, ahead + 0.02],
        "val_accuracy": accuracy,
        "val_loss": 0.4,
        "test_accuracy": accuracy,
        "test_interval": [accuracy - 0.02, accuracy + 0.02],
        "parameters": size // 4,
        "trunk_parameters": size // 8,
        "bytes": size,
        "macs": 40_000_000,
        "p50_ms": 1.25,
        "recall": {"oat": 0.875, "rye": None},
    }


def thumbnail() -> str:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "green").save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()


def full_result() -> dict[str, Any]:
    return numbers(OWN) | {
        "donor": "MobileNetV2",
        "method": "auto",
        "frozen": False,
        "classes": ["oat", "rye"],
        "images": {"train": 30, "val": 10, "test": 12},
        "size": 128,
        "budget": {"text": "0.6MB", "kind": "bytes", "amount": 6e5},
        "seed": 7,
        "seconds": 61.5,
        "versions": {"torch": "2.13"},
        "int8_bytes": 150_000,
        "int8": {"test_accuracy": 0.9, "p50_ms": 0.9, "agreement": 0.985},
        "peak_rss_bytes": 90_000_000,
        "confusion": [[7, 1], [0, 4]],
        "scion": [
            {"layer": "f.0", "index": 0, "channels": 32, "kept": 8, "read": [[0, 5], [9, 12]]}
        ],
        "curve": [numbers(0.5, 10_000) | {"cut": 1}, numbers(0.7, 90_000) | {"cut": 2}],
        "baselines": {
            "fine-tuned donor": numbers(0.93, 8_900_000),
            "distilled student": numbers(0.85),
        },
        "mistakes": [
            {
                "name": "test/7.jpg",
                "label": "oat",
                "predicted": "rye",
                "confidence": 0.75,
                "thumbnail": thumbnail(),
            }
        ],
        "history": [
            {"train_loss": 2.0, "val_loss": 1.5, "val_accuracy": 0.5, "seconds": 1.0},
            {"train_loss": 1.0, "val_loss": 0.9, "val_accuracy": 0.8, "seconds": 1.0},
        ],
        "warnings": ["Class rye has one image of validation."],
        "skipped": [{"name": "torn.jpg", "reason": "truncated"}],
    }


class Page(HTMLParser):
    """Tags, sources and text of a page; raises where tags do not close in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def content() -> str:
    return render_page(full_result())


@pytest.fixture(scope="module")
def page(content: str) -> Page:
    return Page(content)


def test_the_page_draws_which_features_of_a_layer_the_head_reads(content: str) -> None:
    assert "8 of 32" in content
    assert 'viewBox="0 0 32 1"' in content
    assert '<path d="M0 0H5V1H0zM9 0H12V1H9z">' in content


@given(st.sets(st.integers(0, 40)))
def test_runs_hold_the_numbers_that_they_were_made_of_and_do_not_touch(numbers: set[int]) -> None:
    actual = _runs(sorted(numbers))
    assert [n for first, behind in actual for n in range(first, behind)] == sorted(numbers)
    assert all(before[1] < after[0] for before, after in pairwise(actual))


def test_the_verdict_comes_first_in_one_sentence(page: Page) -> None:
    verdict = (
        "The rootstock has 0.50 MB and reaches 91.2 % [89.2, 93.2] on the test images; the "
        "fine-tuned donor of 8.90 MB reaches 93.0 %."
    )
    assert page.text.index(verdict) < page.text.index("Donor and rootstock")


@pytest.mark.parametrize(
    ("accuracy", "size", "pays", "text"),
    [
        (0.95, 500_000, False, "Grafting does not pay here: of the baselines of its size, student"),
        (0.95, 500_000, False, "lead is -3.8 points [-5.8, -1.8]"),
        (0.95, 508_000, False, "Grafting does not pay here"),  # a few nodes more
        (0.95, 600_000, False, "whether grafting pays is open"),  # larger, so no rival
        (0.92, 500_000, False, "Grafting may or may not pay here"),
        (0.90, 500_000, False, "Grafting may or may not pay here"),
        (0.85, 500_000, True, "Grafting pays here"),
    ],
)
def test_the_verdict_is_that_of_baselines_of_no_more_bytes(
    accuracy: float, size: int, pays: bool, text: str
) -> None:
    actual = judge(numbers(OWN) | {"baselines": {"student": numbers(accuracy, size)}})
    assert text in " ".join(actual.sentences)
    assert actual.pays is pays


def test_a_large_donor_that_is_better_does_not_forbid_the_graft() -> None:
    baselines = {"fine-tuned donor": numbers(0.99, 8_900_000), "student": numbers(0.5)}
    assert judge(numbers(OWN) | {"baselines": baselines}).pays


def test_without_a_donor_to_compare_with_the_headline_has_the_rootstock_alone() -> None:
    header, *rows = headline(numbers(OWN) | {"baselines": {"student": numbers(0.9)}})
    assert header == ("", "rootstock")
    assert ("size, MB", "0.50") in rows


def test_without_baselines_the_verdict_says_how_to_train_them() -> None:
    verdict = judge(numbers(OWN) | {"baselines": {}, "baselines_trained": False})
    assert "--baselines trains them" in verdict.sentences[1]
    assert not verdict.pays


def test_the_headline_has_the_rows_of_the_paper_and_what_it_omits(page: Page) -> None:
    for row in (
        "parameters 2,225,000 125,000 94.4",
        "size, MB 8.90 0.50 94.4",
        "validation accuracy, % 93.0 91.2",
        "validation loss 0.400 0.400",
        "test accuracy, % 93.0 91.2",
        "multiply-accumulates, M 40.0 40.0 0.0",
        "latency p50, ms 1.250 1.250 0.0",
    ):
        assert row in page.text


def test_every_part_of_a_result_is_on_the_page(page: Page) -> None:
    for words in (
        "distilled student 125,000 62,500 0.50 40.0 1.250 85.0 0.400 85.0 83.0 – 87.0",
        "rootstock, int8 125,000 62,500 0.15 40.0 0.900 – – 90.0 –",
        "the same class as float32 on 98.5 %",
        "oat 87.5 87.5",
        "rye – –",
        "f.0 8 of 32",
        "rye (75.0 %), but oat test/7.jpg",
        "Class rye has one image of validation.",
        "torn.jpg: truncated",
        "30 train, 10 val, 12 test",
        "budget 0.6MB (600,000 bytes)",
    ):
        assert words in page.text
    assert page.tags.count("img") == 3  # frontier, training, one mistake


def test_nothing_on_the_page_comes_from_elsewhere(page: Page) -> None:
    assert page.sources
    assert all(source.startswith("data:image/") for source in page.sources)
    assert {"script", "link", "iframe", "object"}.isdisjoint(page.tags)


def hostile(value: Any) -> Any:
    """Every text of a result, and every key that names something, made hostile."""
    if isinstance(value, dict):
        named = {"oat", "rye", "distilled student", "torch"}
        return {f"{HOSTILE}{k}" if k in named else k: hostile(v) for k, v in value.items()}
    if isinstance(value, list):
        return [hostile(entry) for entry in value]
    return HOSTILE if isinstance(value, str) else value


def test_hostile_names_are_shown_and_do_nothing(tmp_path: Path) -> None:
    write_report(hostile(full_result()), tmp_path / "report.html")
    content = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(content)
    assert "script" not in page.tags
    assert '<script>alert("1")</script>' in page.text
    assert not re.search("[\x00\u202e]", content)
    figures = re.findall(r"image/svg\+xml;base64,([^\"]+)", content)
    assert len(figures) == 2
    for figure in figures:
        tags = {
            each.tag.rpartition("}")[2]
            for each in ElementTree.fromstring(base64.b64decode(figure)).iter()
        }
        assert "script" not in tags


@pytest.mark.slow
@settings(max_examples=10)
@given(st.sets(st.sampled_from(sorted(full_result()))))
def test_any_part_may_be_missing(missing: set[str]) -> None:
    left = {key: value for key, value in full_result().items() if key not in missing}
    assert Page(render_page(left)).text


def test_a_confusion_without_the_names_of_classes_is_left_out(page: Page) -> None:
    drawn = {"confusion": [[7, 1], [0, 4]], "recall": {"oat": 0.875, "rye": 1.0}}
    assert "Confusion" in page.text
    assert "Confusion" in Page(render_page(drawn | {"classes": ["oat", "rye"]})).text
    assert "Confusion" not in Page(render_page(drawn)).text


def test_an_empty_result_says_that_nothing_was_measured() -> None:
    assert "was not measured" in Page(render_page({})).text


@pytest.mark.slow
def test_the_same_result_gives_the_same_page(content: str) -> None:
    assert render_page(full_result()) == content


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        write_report({}, tmp_path / "report.html")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_the_spread_over_draws_is_told() -> None:
    page = render_page({"draws": [0.9, 0.92]})
    assert "on 2 other draws" in page
    assert "mean 91.0 %, standard deviation 1.4" in page
