"""Whether an answer's code passes the tests of its prompt."""

import os
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from graftkit.distill.config import CodeRule
from graftkit.distill.records import Prompt, SourceAnswer
from graftkit.distill.scores import Verdict, finished
from graftkit.distill.scores.sandbox import check_sandbox, run_tests
from graftkit.errors import RowsError

FENCE = "```"
LABELS = ("python", "python3", "py")


class CodeTests:
    """The tests of the prompt on the answer's code, in a sandbox, one for each core.

    Raises: ConfigError elsewhere than on Linux, or without bubblewrap; SourceError where its
        sandbox does not start.
    """

    costly = True

    def __init__(self, rule: CodeRule):
        self.rule = rule
        check_sandbox()

    def score(
        self, answers: Sequence[SourceAnswer], prompts: Mapping[int, Prompt], done: Container[int]
    ) -> Iterator[tuple[int, Verdict]]:
        """1.0, or why not, as tests end. Raises: RowsError for a prompt without tests."""
        todo = [(i, a, _tests(prompts[a.prompt_id])) for i, a in finished(answers) if i not in done]
        pool = ThreadPoolExecutor(os.cpu_count())
        try:
            futures = {pool.submit(self._run, answer, tests): i for i, answer, tests in todo}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _run(self, answer: SourceAnswer, tests: str) -> Verdict:
        rule = self.rule
        code = find_code(answer.text)
        failed = run_tests(code, tests, rule.timeout_seconds, rule.memory_bytes)
        return 1.0 if failed is None else failed


def find_code(text: str) -> str:
    """The last fenced block that says it is Python, else the last that says nothing, else all."""
    labelled: list[list[str]] = []
    plain: list[list[str]] = []
    block: list[str] | None = None
    for line in text.split("\n"):
        mark = line.strip()
        if not mark.startswith(FENCE):
            if block is not None:
                block.append(line)
        elif block is None:
            block, label = [], mark.removeprefix(FENCE).strip().lower()
            if label in LABELS or not label:
                (labelled if label else plain).append(block)
        else:
            block = None
    blocks = labelled or plain
    return "\n".join(blocks[-1]) if blocks else text


def _tests(prompt: Prompt) -> str:
    if prompt.tests is None:
        raise RowsError(
            f"prompt {prompt.id} (from 0): no tests; expected Python in its field tests, or leave "
            "the rule code out"
        )
    return prompt.tests
