"""Prompts and answers as the text that the target is trained on."""

from typing import Any

from graftkit.distill.records import Scored
from graftkit.errors import CheckpointError, RowsError
from graftkit.models.encoding import context_length
from graftkit.rows import Row, encode_row


class Template:
    """Plain text, or turns of a chat in the target's own template.

    Args:
        model: the target, without weights; says how much it reads. limit: most tokens of a row.
    Raises: CheckpointError for a chat with a tokenizer that has no chat template.
    """

    def __init__(self, tokenizer: Any, model: Any, chat: bool, limit: int):
        self.tokenizer, self.chat = tokenizer, chat
        self.limit = min(limit, context_length(model) or limit)
        if chat and not tokenizer.chat_template:
            raise CheckpointError(
                "prompts.chat is on, but the target's tokenizer has no chat template; use an "
                "instruct model, or turn it off"
            )
        self._end = self._end_of_turn() if chat else ""

    def row(self, prompt: str, answer: str) -> Row:
        """What the target reads and what it should say; an EOS is added by whoever encodes it."""
        if not self.chat:
            return Row(prompt, " " + answer)
        return Row(self._turn(prompt), answer + self._end)

    def fits(self, scored: Scored) -> bool:
        """Whether a row is short enough."""
        try:
            encode_row(self.tokenizer, self.row(*_texts(scored)), self.limit)
        except RowsError:
            return False
        return True

    def _turn(self, prompt: str) -> str:
        turns = [{"role": "user", "content": prompt}]
        text: str = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        # The tokenizer adds its own BOS when the row is encoded.
        bos = self.tokenizer.bos_token
        adds = bos and self.tokenizer.encode("")[:1] == [self.tokenizer.bos_token_id]
        return text.removeprefix(bos) if adds else text

    def _end_of_turn(self) -> str:
        """What the template puts behind an answer, such as <end_of_turn>, where it is no EOS."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
        text: str = self.tokenizer.apply_chat_template(turns, tokenize=False)
        end = text.rpartition("ANSWER")[2].strip()
        eos = self.tokenizer.eos_token
        return end.partition(eos)[0] if eos else end


def _texts(scored: Scored) -> tuple[str, str]:
    return scored.answer.prompt, scored.answer.text
