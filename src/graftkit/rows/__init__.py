"""Rows of text: on which models are calibrated, trained and measured, and prompts are routed.

chat   conversations in the chat template of a tokenizer
row    the three formats, their tokens, samples and batches
files  JSON Lines, Parquet, and the folders of data sets
"""

from graftkit.rows.chat import (
    chat_template,
    encode_question,
    end_of_turn,
    template_digest,
    write_messages,
)
from graftkit.rows.files import (
    data_files,
    prompt_of_record,
    read_prompts,
    read_records,
    read_rows,
    row_of_record,
    rows_digest,
    text_field,
)
from graftkit.rows.row import (
    EncodedRow,
    Row,
    RowFormat,
    Tokenizer,
    batches_by_length,
    check_answerable,
    encode_prompt,
    encode_row,
    pad_batch,
    sample_rows,
)

__all__ = [
    "EncodedRow",
    "Row",
    "RowFormat",
    "Tokenizer",
    "batches_by_length",
    "chat_template",
    "check_answerable",
    "data_files",
    "encode_prompt",
    "encode_question",
    "encode_row",
    "end_of_turn",
    "pad_batch",
    "prompt_of_record",
    "read_prompts",
    "read_records",
    "read_rows",
    "row_of_record",
    "rows_digest",
    "sample_rows",
    "template_digest",
    "text_field",
    "write_messages",
]
