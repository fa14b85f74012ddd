"""A table's rows as a kit's tokenizer cuts them: the same ids that transformers makes of them."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any, NoReturn

import numpy as np
from tokenizers import Tokenizer

from fedpeft.data import Rendered, Rows, Store, Table, dialogue, joined, turns
from fedpeft.errors import ConfigError
from fedpeft.training.kit import TOKENIZER, Kit

_AT_ONCE = 256  # texts that are tokenised in one go: what tokenizers says of each takes far more room than its ids


def tokenise(kit: Kit, table: Table, length: int, rows: Rows | None = None) -> Store:
    """A store of these rows of a table (ascending; all if not given), texts cut to ``length`` tokens.

    A row's tokens depend on nothing but its text. ValueError for a table of another task than the kit's; ConfigError
    for a tokenizer or a chat template that can't be used.
    """
    facts = kit.facts
    if table.task != facts.task:
        raise ValueError(f"the table is for {table.task}; want one for {facts.task}, the kit's task")
    rows = np.arange(len(table)) if rows is None else rows
    numbers, cuts = rows.tolist(), _tokenizer(kit)
    if facts.task == "classify":
        cuts.enable_truncation(length, direction=facts.cuts)
        ids = _ids(cuts, [table.texts[i] for i in numbers], whole=True)
        return joined(ids, rows, table.labels, np.zeros(len(rows), np.bool_), len(table))
    rendered = None if kit.template is None else renderer(kit.template, facts.marks)
    pairs = [turns(table.texts[i], table.replies[i], facts.bos, facts.eos, rendered) for i in numbers]
    return dialogue(pairs, lambda texts: _ids(cuts, texts, whole=False), length, rows, len(table))


def renderer(template: str, marks: Mapping[str, str]) -> Rendered:
    """What a chat template makes of turns: in a sandbox, with the settings, filters and functions that transformers
    gives to templates. marks: the names of special tokens that it may use. ConfigError for one that can't be read."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}``, which marks what the model said, and is nothing to us."""

        tags = {"generation"}  # noqa: RUF012  # jinja2's own way

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    around = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    around.filters["tojson"] = _json
    around.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    try:
        ready = around.from_string(template)
    except TemplateError as error:
        raise ConfigError(f"kit: its chat template can't be read: {error}; export it anew") from error

    def rendered(turns: Sequence[Mapping[str, str]], asks: bool) -> str:
        try:
            return ready.render(
                marks, messages=[dict(x) for x in turns], tools=None, documents=None, add_generation_prompt=asks
            )
        except TemplateError as error:
            raise ConfigError(f"model.name: its chat template refuses a prompt and a reply: {error}") from error

    return rendered


def _json(
    x: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Without jinja2's escapes for HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _tokenizer(kit: Kit) -> Tokenizer:
    file = kit.path(TOKENIZER)
    try:
        found = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises no other kind
        raise ConfigError(f"kit: {file} can't be read: {error}; copy the kit again, or export it anew") from error
    found.no_truncation()
    found.no_padding()
    return found


def _ids(cuts: Tokenizer, texts: Sequence[str], whole: bool) -> list[list[int]]:
    """whole: with the tokens for begin and end, which the tokenizer may have."""
    batch = partial(cuts.encode_batch_fast, add_special_tokens=whole)
    parts = (batch(list(texts[i : i + _AT_ONCE])) for i in range(0, len(texts), _AT_ONCE))
    return [x.ids for part in parts for x in part]
