"""A device without transformers makes the ids that transformers makes."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from fedpeft.data import Source, Store, Table, load
from fedpeft.errors import ConfigError
from fedpeft.ondevice.tokens import renderer, tokenise
from fedpeft.training import tokens
from fedpeft.training.kit import TEMPLATE, TOKENIZER, Kit
from fedpeft.training.packaged import folder

TURNS = [{"role": "user", "content": "a <b> & 'c'"}, {"role": "assistant", "content": "é\n"}]


def kit_of(words: PreTrainedTokenizerBase, like: Kit, out: Path) -> Kit:
    """A kit with this tokenizer; the rest is another's."""
    words.backend_tokenizer.save(str(out / TOKENIZER))
    files = {TOKENIZER: ("", 0)}
    if words.chat_template is not None:
        (out / TEMPLATE).write_text(words.chat_template)
        files[TEMPLATE] = ("", 0)
    marks = {n: str(x) for n, x in words.special_tokens_map.items()}
    facts = replace(like.facts, bos=words.bos_token or "", eos=words.eos_token or "", marks=marks)
    return Kit(out, "", "", facts, files)


def need_same(got: Store, want: Store) -> None:
    for name in ("tokens", "offsets", "targets", "state"):
        x, y = getattr(got, name), getattr(want, name)
        assert x.dtype == y.dtype, name
        np.testing.assert_array_equal(x, y, err_msg=name)


@pytest.mark.parametrize(
    ("model", "data", "task", "lengths"),
    [
        pytest.param("minilm", "wiki11", "classify", (12, 128), marks=pytest.mark.slow),
        pytest.param("smollm2", "chitchat", "lm", (48,), marks=pytest.mark.slow),
        pytest.param("tiny-bert", "", "classify", (9,), id="tiny-bert"),
        pytest.param("tiny-llama", "", "lm", (14,), id="tiny-llama"),
    ],
)
def test_rows_have_the_ids_that_transformers_gives_them(kits, federations, tmp_path, model, data, task, lengths):
    words = AutoTokenizer.from_pretrained(str(folder(model)))
    words.padding_side = "right"
    table = load(Source(data)) if data else federations[task].table
    kit = kit_of(words, kits[task], tmp_path)
    if lengths == (9,):
        words.truncation_side = "left"
        kit = replace(kit, facts=replace(kit.facts, cuts="left"))
    rows = np.arange(0, len(table), max(1, len(table) // 80))
    base = SimpleNamespace(task=task, words=words)
    for length in lengths:
        want = tokens.tokenise(table, base, length, rows)
        need_same(tokenise(kit, table, length, rows), want)
        found = want.lengths(rows)
        assert found.max() == length  # so that truncation is tried
    if task == "lm":
        plain = replace(table, inputs=("",) * len(table))
        need_same(tokenise(kit, plain, length, rows), tokens.tokenise(plain, base, length, rows))
        bare = replace(kit, files={TOKENIZER: ("", 0)})
        words.chat_template = None
        need_same(tokenise(bare, table, length, rows), tokens.tokenise(table, base, length, rows))


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}\n  {% if loop.first %}\n{{ bos_token }}{% endif %}\n{{ m.role }}: {{ m['content'] }}\n"
        "{% endfor %}\n{%- if add_generation_prompt %}bot:{% endif %}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m | tojson }}{% break %}{% endfor %}",
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ messages[0].content }}{% endgeneration %}{{ x }}",
        "{% set seen = namespace(n=0) %}{% for m in messages %}{% set seen.n = seen.n + 1 %}{% endfor %}{{ seen.n }}",
        "{{ strftime_now('%Y') }}{{ tools is none }}{{ documents }}",
        "{{ eos_token | upper }}{{ messages | tojson(indent=2) }}",
        "{{ dict(a=1).a }}{{ messages[0].content | trim }}",
    ],
)
def test_chat_templates_render_as_transformers_renders_them(template):
    marks = {"bos_token": "<s>", "eos_token": "</s>"}
    for asks in (False, True):
        [want], _ = render_jinja_template([TURNS], chat_template=template, add_generation_prompt=asks, **marks)
        assert renderer(template, marks)(TURNS, asks) == want


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for %}", "kit: its chat template can't be read"),
        (
            "{{ raise_exception('roles must alternate') }}",
            "chat template refuses a prompt and a reply: roles must alte",
        ),
        ("{{ messages.append(1) }}", "chat template refuses a prompt and a reply"),
        ("{{ ''.__class__.__mro__ }}", "chat template refuses a prompt and a reply"),
    ],
)
def test_a_template_that_can_not_be_used_is_refused(template, text):
    with pytest.raises(ConfigError, match=text):
        renderer(template, {})(TURNS, False)


def test_a_template_must_put_the_reply_behind_its_prompt(kits, tmp_path):
    kit = kits["lm"]
    (tmp_path / TOKENIZER).write_bytes(kit.path(TOKENIZER).read_bytes())
    (tmp_path / TEMPLATE).write_text("{{ messages | length }}{{ messages[0].content }}")
    other = replace(kit, folder=tmp_path)
    with pytest.raises(ConfigError, match=r"model.name: the chat template does not put the reply right after"):
        tokenise(other, Table("lm", ("a",), ("b",)), 9)


def test_a_table_must_be_of_the_kits_task_and_its_tokenizer_readable(kits, federations, tmp_path):
    with pytest.raises(ValueError, match=r"the table is for lm; want one for classify, the kit's task"):
        tokenise(kits["classify"], federations["lm"].table, 9)
    (tmp_path / TOKENIZER).write_text("{}")
    with pytest.raises(ConfigError, match=r"kit: .*tokenizer.json can't be read: .*; copy the kit again"):
        tokenise(replace(kits["classify"], folder=tmp_path), federations["classify"].table, 9)


def test_no_rows_are_no_tokens(kits, federations):
    for task, kit in kits.items():
        found = tokenise(kit, federations[task].table, 9, np.arange(0))
        assert (len(found), found.tokens.size, found.state.max()) == (22, 0, 0)
