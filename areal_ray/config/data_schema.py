"""The data's part of the schema: every key, its type, its default and what it does."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

Format = Literal["text", "messages", "completion", "preference"]


@dataclass(frozen=True)
class SourceConfig:
    """Documents, or records, of one kind and from one place."""

    # stdlib: Python's own · text · jsonl · parquet · csv · hub · megatron, datasets: tokens · package.module:function
    source: str = "stdlib"
    args: dict[str, Any] = field(default_factory=dict)  # of one's own source, or of `datasets` (hub): name, split, ...
    paths: list[str] = field(default_factory=list)  # files, directories or globs, s3:// too; hub: names of data sets
    format: Format = "text"  # or records: messages (chat), prompt and completion, prompt with chosen and rejected
    fields: dict[str, str] = field(default_factory=dict)  # names of a record's fields, if others: {text: body}
    newlines: Literal["keep", "lf"] = "keep"  # lf: of line ends CRLF and CR, too, only LF becomes tokens
    on_error: Literal["fail", "skip", "replace"] = "fail"  # invalid UTF-8 or record; replace: by U+FFFD, text only
    held_out: float = 0.05  # share of the documents kept for evaluation, chosen by the hash of their content; 0: none
    held_out_paths: list[str] = field(default_factory=list)  # instead: the documents to evaluate on


@dataclass(frozen=True)
class MixtureConfig(SourceConfig):
    """One source of several."""

    name: str = ""  # in metrics
    weight: float = 1.0  # its share of the rows, beside the other weights


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    mixture: list[MixtureConfig] = field(default_factory=list)  # several sources, instead of the one above
    tokenizer: str | None = None  # bytes, or the path of a Hugging Face one; null: that of model.path, else bytes
    allow_other_tokenizer: bool = False  # than that of model.path
    add_bos: bool | None = None  # a beginning-of-text token before each document; null: as the tokenizer's own encoding
    add_eos: bool | None = None  # an end-of-text token after each document; null: if the tokenizer has one
    chat_template: str | None = None  # a file with it, or itself; null: the tokenizer's own
    packing: Literal["concatenate", "best_fit", "none"] = "concatenate"  # documents cut anywhere · whole · one a row
    document_mask: bool = False  # attention and positions begin anew with each document of a row
    truncation: Literal["split", "error", "left", "right", "drop"] | None = None  # of what is longer than
    # train.seq_len, where documents stay whole: left cuts their beginning; null: text is split, a record an error
    prepared_path: str | None = None  # of prepared corpora, or of one; null: <run.storage_path>/data
    prepare_in_process_mb: float = 128.0  # of sources that the driver prepares itself; more with all cores
    prefetch_batches: int = 2  # that are read ahead of training, in a thread; 0: each when it is needed

    @property
    def sources(self) -> dict[str, DataConfig]:
        """The data of each source by its name, as if it were alone; without a mixture one, of no name."""
        own = [field.name for field in fields(SourceConfig)]
        return {
            each.name: replace(self, mixture=[], **{name: getattr(each, name) for name in own}) for each in self.mixture
        } or {"": self}
