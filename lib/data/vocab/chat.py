"""Conversations: framed within a document's text, as ids, and which of them are learned from.

In:    messages [{role, content}].   Out: text with two private-use characters a message; ids with
       the tokenizer's chat ids around each; a mask of the ids that an assistant says.
Law:   a content cannot forge a turn: the frame's characters are taken out of it when it is framed,
       and the chat ids come from their names alone, never out of text (data.md 8).
Note:  the template knows two roles. What is no assistant's is a user's, a system message too, as
       `kumiki chat` has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.core.errors import InputError, UserError

if TYPE_CHECKING:  # reading a source needs no tokenizer
    from lib.data.vocab.tokenizer import Tokenizer

TURN, BODY = "\uf8d0", "\uf8d1"  # before a role, before its content; cleaning keeps them
JOIN = "chat"  # of a source, and the name of the one template
CARD = "chat_template.json"  # beside a model whose rows were framed
IDS = ("<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>")
# The same for programs that read Hugging Face's tokenizer_config.json.
JINJA = (
    "{{ bos_token }}{% for m in messages %}{% set r = 'assistant' if m['role'] == 'assistant' "
    "else 'user' %}{{ '<|' + r + '_start|>' + m['content'] + '<|' + r + '_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant_start|>' }}{% endif %}"
)


def card() -> dict[str, Any]:
    """What `CARD` holds."""
    return {"template": JOIN, "ids": list(IDS), "jinja": JINJA}


def frame(messages: Sequence[tuple[str, str]]) -> str:
    """(role, content) each -> the text of the document."""
    bare = str.maketrans("", "", TURN + BODY)
    turns = ((role, content.translate(bare)) for role, content in messages)
    return "".join(f"{TURN}{role}{BODY}{content}" for role, content in turns)


def unframe(text: str) -> list[tuple[str, str]]:
    """(role, content) of each message; InputError where the text is no conversation.

    The tail of a document that was split begins within a turn: it is a user's, never learned from.
    """
    head, *turns = text.split(TURN)
    if not turns or any(turn.count(BODY) != 1 for turn in turns):
        raise InputError(
            "document is no conversation", value=repr(text[:40]),
            remedy="use template: none, or a source with join: chat",
        )  # fmt: skip
    first = [("user", head.replace(BODY, ""))] if head else []
    parted = (turn.split(BODY) for turn in turns)
    return first + [(role.strip(), content) for role, content in parted]


def require_ids(tokenizer: Tokenizer) -> None:
    """UserError for a tokenizer without chat ids."""
    if any(name not in tokenizer.specials for name in IDS):
        raise UserError(
            "tokenizer has no chat ids", value=tokenizer.kind,
            remedy="use a tokenizer of kind bpe, or template: none",
        )  # fmt: skip


def encode(
    texts: Sequence[str], tokenizer: Tokenizer, threads: int
) -> tuple[list[np.ndarray], list[str]]:
    """Ids of framed texts, int32 each, and what their content ids stand for."""
    talks = [unframe(text) for text in texts]
    said = [content for talk in talks for _, content in talk]
    ids, specials = iter(tokenizer.encode_batch(said, threads)), tokenizer.specials
    found = []
    for talk in talks:
        parts: list[np.ndarray] = []
        for role, _ in talk:
            name = "assistant" if role == "assistant" else "user"
            ends = (specials[f"<|{name}_{end}|>"] for end in ("start", "end"))
            first, last = (np.array([index], np.int32) for index in ends)
            parts += [first, np.asarray(next(ids), np.int32), last]
        found.append(np.concatenate(parts))
    return found, ["".join(content for _, content in talk) for talk in talks]


def limits(tokenizer: Tokenizer) -> tuple[int, list[int]]:
    """The id that opens an assistant's turn, and those after which none speaks: the turn's end,

    a user's turn, another document.
    """
    user, _, opens, end = (tokenizer.specials[name] for name in IDS)
    return opens, [end, user, *(i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None)]
